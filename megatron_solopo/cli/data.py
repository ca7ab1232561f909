"""The commands that make, check and tokenize preference data."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import click

_PATH = click.Path(path_type=Path)
_JSON = click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
_OVERWRITE = click.option("--overwrite", is_flag=True, help="Replace an existing output file and its report.")
_CONTEXTS = click.option("--contexts", type=_PATH, required=True, help="What `data build` wrote.")
_TOKENIZER = click.option("--tokenizer", required=True, help="Hugging Face directory or SentencePiece .model file.")


def _choice(*names: str) -> click.Choice[str]:
    return click.Choice(list(names))


def _option(*names: str, help: str, **attributes: Any) -> Callable[..., Any]:
    """An option that shows its default, where it has one."""
    return click.option(*names, help=help, show_default=attributes.get("default") is not None, **attributes)


def _show(report: Any, output: Path, as_json: bool) -> None:
    """A stage's report on the terminal."""
    from megatron_solopo.triplets.report import report_directory

    page = report_directory(output) / "index.html"
    click.echo(json.dumps(report.to_json(), indent=2) if as_json else f"{output}\n{report}\nreport: {page}")


@click.group()
def data() -> None:
    """Make, check and tokenize preference data.

    \b
    From a question answering corpus, with a model's own answers:
      megatron-solopo data build    ...   short and long contexts around the same evidence
      megatron-solopo data sample   ...   answers to the short ones, many per question
      megatron-solopo data select   ...   a right and a wrong one: triplets
      megatron-solopo data prepare  ...   tokenize them
    """


@data.command("build")
@click.option("--input", type=_PATH, required=True, help="The corpus: JSON lines or one JSON array.")
@click.option("--output", type=_PATH, required=True, help="JSONL to write; its report goes beside it.")
@_TOKENIZER
@_option("--format", default="musique", type=_choice("musique", "hotpotqa", "2wikimultihopqa", "squad", "generic"),
         help="Of the corpus; generic is {id, question, answers, documents: [{title, text, supporting}]}.")  # fmt: skip
@_option("--pool", type=_PATH, help="More documents to draw distractors from, JSONL of {title, text}.")
@_option("--template", default="plain", type=_choice("plain", "chat"),
         help="Prompts as text, or as chat messages, measured with the chat template.")  # fmt: skip
@_option("--prompt-template", type=_PATH, help="Jinja file over `documents` (title, text) and `question`.")
@click.option("--titles/--no-titles", default=True, show_default=True, help="Show the documents' titles.")
@_option("--short-distractors", type=int, help="Documents beside the evidence in the short context.  [default: 3]")
@_option("--short-tokens", type=int, help="Fill the short context to this length instead, response included.")
@_option("--long-tokens", default="8192",
         help="Length of the long context with its response, never exceeded: 8192 | 4096,131072 (a row for each) | "
         "8192:0.7,131072:0.3 (drawn) | uniform:4096-131072 | loguniform:4096-131072.")  # fmt: skip
@_option("--responses", default="sampled", type=_choice("sampled", "constructed"),
         help="sampled: leave room for `data sample`'s; constructed: MuSiQue's by rule, triplets at once.")  # fmt: skip
@_option("--response-tokens", type=int, help="Room for the longest sampled response.  [default: 512]")
@_option("--leak-rule", default="substring", type=_choice("substring", "word", "allow"),
         help="Exclude distractors with an answer anywhere in them, as whole words, or none.")  # fmt: skip
@_option("--document-order", default="random", type=_choice("random", "corpus"),
         help="Of documents; in the long context the evidence is scattered either way.")  # fmt: skip
@_option("--underfull", default="drop", type=_choice("drop", "keep"),
         help="Rows whose length the pool does not suffice for; both are counted.")  # fmt: skip
@_option("--bad-rows", default="refuse", type=_choice("refuse", "drop"),
         help="Rows that are not of the format are an error, or left out and listed in the report.")  # fmt: skip
@_option("--seed", default=0, help="Of every random choice.")
@_option("--num-proc", default=1, help="Processes; the output does not depend on it.")
@_OVERWRITE
@_JSON
def build(as_json: bool, **options: Any) -> None:
    """Build short and long contexts around the same evidence, from a question answering corpus.

    \b
    Examples:
      megatron-solopo data build --input musique_ans_v1.0_train.jsonl --output contexts.jsonl \\
          --tokenizer MODEL_DIR --template chat --long-tokens 8192,131072 --num-proc 16
      megatron-solopo data build --input examples/musique/musique.jsonl --output triplets.jsonl \\
          --tokenizer examples/musique/work/model --long-tokens 2048 --responses constructed
    """
    from megatron_solopo.triplets.build import build as run
    from megatron_solopo.triplets.settings import BuildSettings

    _show(run(BuildSettings(**options)), options["output"], as_json)


@data.command("sample")
@_CONTEXTS
@click.option("--output", type=_PATH, required=True, help="JSONL of responses, continued where it exists.")
@click.option("--model", required=True, help="Hugging Face directory; with --server, the model's name there.")
@_option("--server", help="Base URL of a server with OpenAI's API: http://localhost:8000/v1.")
@_option("--num-samples", default=32, help="Responses per question.")
@_option("--temperature", default=0.85, help="Of sampling.")
@_option("--top-p", default=1.0, help="Of sampling.")
@_option("--max-tokens", type=int, help="Of a response.  [default: the contexts' room less 8]")
@_option("--samples-per-request", default=8, help="Responses asked for at once; without --server, the batch.")
@_option("--concurrency", default=32, help="Requests under way at once.")
@_option(
    "--timeout",
    default=600.0,
    help="Seconds that a request may take; one to a vLLM that is being stopped may hang as long.",
)
@_option("--retries", default=8, help="How often a request that fails is sent again.")
@_option("--backoff", default=1.0, help="Seconds before the first retry; doubled each time, up to a minute.")
@_option("--api-key-env", help="Environment variable that holds the server's key.")
@_option("--seed", default=0, help="Every request's seed is derived from it.")
@_JSON
def sample(as_json: bool, **options: Any) -> None:
    """Sample responses to the short contexts. Killed and started again, it asks only for what is missing.

    \b
    Examples:
      vllm serve Qwen/Qwen2.5-7B-Instruct --generation-config vllm   # the model's own top_k would change the sampling
      megatron-solopo data sample --contexts contexts.jsonl --output responses.jsonl \\
          --server http://localhost:8000/v1 --model Qwen/Qwen2.5-7B-Instruct
      megatron-solopo data sample --contexts contexts.jsonl --output responses.jsonl --model MODEL_DIR
    """
    from megatron_solopo.triplets.sample import sample as run
    from megatron_solopo.triplets.settings import SampleSettings

    _show(run(SampleSettings(**options)), options["output"], as_json)


@data.command("select")
@_CONTEXTS
@click.option("--responses", type=_PATH, required=True, help="What `data sample` wrote.")
@click.option("--output", type=_PATH, required=True, help="Triplet JSONL to write; its report goes beside it.")
@_TOKENIZER
@_option("--score", default="sub_em", type=_choice("sub_em", "string_match_part", "string_match_all", "token_f1"),
         help="What makes a response right: SQuAD-normalised substring, RULER's two, LongBench's F1.")  # fmt: skip
@_option("--threshold", default=1.0, help="Least score of a right response.")
@_option("--scored-text", default="final", type=_choice("final", "whole"),
         help="Score what stands behind the answer's marker, where it is, or all of the response.")  # fmt: skip
@_option("--answer-marker", default="answer is:", help="Text before a response's final answer.")
@_option("--chosen", default="shortest", type=_choice("shortest", "random", "highest_f1"),
         help="Which of the right responses.")  # fmt: skip
@_option("--rejected", default="random", type=_choice("random", "highest_f1", "nearest_length"),
         help="Which of the wrong ones.")  # fmt: skip
@_option("--max-pairs-per-question", default=1, help="No response is in two pairs.")
@_option("--min-length-ratio", type=float, help="Least tokens of chosen over rejected.")
@_option("--max-length-ratio", type=float, help="Most tokens of chosen over rejected.")
@_option("--seed", default=0, help="Of draws and ties.")
@_OVERWRITE
@_JSON
def select(as_json: bool, **options: Any) -> None:
    """Score responses, choose a right and a wrong one for each question, and write triplets.

    \b
    Example:
      megatron-solopo data select --contexts contexts.jsonl --responses responses.jsonl \\
          --output triplets.jsonl --tokenizer MODEL_DIR --min-length-ratio 0.5 --max-length-ratio 2
    """
    from megatron_solopo.triplets.select import select as run
    from megatron_solopo.triplets.settings import SelectSettings

    _show(run(SelectSettings(**options)), options["output"], as_json)


@data.command("validate")
@click.argument("file", type=_PATH)
@click.option("--json", "as_json", is_flag=True, help="Print JSON for programs.")
def data_validate(file: Path, as_json: bool) -> None:
    """List every bad row of a triplet or pair file: line, field, reason. Exit code 1 if there is any.

    \b
    Example:
      megatron-solopo data validate triplets.jsonl
    """
    from megatron_solopo.data.row_files import validate_file

    report = validate_file(file)
    click.echo(json.dumps(report.to_json(), indent=2) if as_json else str(report))
    if report.errors:
        sys.exit(1)


@data.command("prepare")
@click.option("--input", "source", type=_PATH, required=True, help="Triplet or pair file, JSONL or parquet.")
@click.option("--output", type=_PATH, required=True, help="Directory to write (`data.path` in the config).")
@_TOKENIZER
@click.option("--template", type=click.Choice(["auto", "chat", "plain"]), default="auto", show_default=True,
              help="auto: chat template for messages, plain text for strings.")  # fmt: skip
@click.option("--max-length", type=int, help="Most tokens of a prompt with a response.")
@click.option("--overlong", type=click.Choice(["refuse", "drop"]), default="refuse", show_default=True,
              help="Longer rows are an error, or left out and counted. Nothing is ever cut.")  # fmt: skip
@click.option("--eval-count", default=0, show_default=True, help="Rows to hold out for evaluation.")
@click.option("--seed", default=1234, show_default=True, help="Draws the held-out rows.")
@click.option("--num-proc", default=1, show_default=True, help="Processes that tokenize.")
@click.option("--overwrite", is_flag=True, help="Replace the output if it is a prepared directory.")
@click.option("--json", "as_json", is_flag=True, help="Print the manifest as JSON.")
def data_prepare(
    source: Path,
    output: Path,
    tokenizer: str,
    template: Literal["auto", "chat", "plain"],
    max_length: int | None,
    overlong: Literal["refuse", "drop"],
    eval_count: int,
    seed: int,
    num_proc: int,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Tokenize a file once, into memory-mapped splits with a fingerprint.

    \b
    Example:
      megatron-solopo data prepare --input triplets.jsonl --output prepared \\
          --tokenizer examples/musique/work/model --eval-count 16
    """
    from megatron_solopo.data.tokenize import prepare

    manifest = prepare(
        source,
        output,
        tokenizer,
        template=template,
        max_length=max_length,
        overlong=overlong,
        eval_count=eval_count,
        seed=seed,
        num_proc=num_proc,
        overwrite=overwrite,
    )
    click.echo(manifest.model_dump_json(indent=2) if as_json else f"{output}\n{manifest}")
