"""Prompts that a server will never answer: recorded in the journal, counted, and passed over up to a limit."""

from collections.abc import Sequence

from megatron_solopo.errors import UserError
from megatron_solopo.files import counted
from megatron_solopo.generate.journal import Journal, RefusedRequest
from megatron_solopo.generate.model import Request, RequestRefused
from megatron_solopo.generate.settings import ServerSettings

_SHOWN_REASONS = 3


class Refusals:
    """Records what is refused. An instance is a `generate.model.Refuse`.

    A refusal whose cause may be the settings and not the prompt is recorded only once the journal has an answer.

    Args:
        journal: Takes the records.
        prompts: Number of prompts of the whole run.
        answers_per_prompt: How many answers each prompt gets.

    Raises UserError if the journal already has more refusals than the settings allow.
    """

    def __init__(self, journal: Journal, settings: ServerSettings, prompts: int, answers_per_prompt: int = 1) -> None:
        self._journal = journal
        self._settings = settings
        self._wanted = prompts * answers_per_prompt
        self._allowed_prompts = max(1, int(settings.max_refused * prompts)) if settings.max_refused else 0
        self._allowed = self._allowed_prompts * answers_per_prompt
        self._undecided: list[RefusedRequest] = []
        self._check_limit()

    def __call__(self, request: Request, refusal: RequestRefused) -> None:
        """Record a refusal. Raises UserError once there are more than the settings allow."""
        record = RefusedRequest(
            question_id=request.question_id, indices=list(request.indices), refused=refusal.kind, detail=str(refusal)
        )
        if refusal.certain:
            self._journal.append([record])
            self._check_limit()
            return
        self._undecided.append(record)
        if self._journal.count:
            self.settle()
        elif len(self._undecided) >= max(_SHOWN_REASONS, self._settings.concurrency):
            self._refuse_all()

    def settle(self) -> None:
        """Record what was undecided. Raises UserError if no request was answered at all. Call it at the end."""
        if self._undecided and not self._journal.count:
            self._refuse_all()
        if self._undecided:
            self._journal.append(self._undecided)
            self._undecided = []
        self._check_limit()

    def _refuse_all(self) -> None:
        raise UserError(
            f"--server {self._settings.server}: refuses every request so far: {_shown(self._undecided)}; nothing of it "
            "is recorded, mend the settings or the server and start again"
        )

    def _check_limit(self) -> None:
        refused = self._journal.refusals()
        count = sum(len(each.indices) for each in refused)
        if count > self._allowed:
            raise UserError(
                f"--server {self._settings.server}: refuses {count} of {self._wanted} answers for ever, and "
                f"--max-refused {self._settings.max_refused:g} allows {self._allowed}, which are the answers to "
                f"{counted(self._allowed_prompts, 'prompt')}: {_shown(refused)}; raise --max-refused to pass over "
                "them, or ask again with --retry-refused"
            )


def _shown(refused: Sequence[RefusedRequest]) -> str:
    reasons = {f"{each.question_id}: {each.detail}": None for each in refused}
    return "; ".join(list(reasons)[:_SHOWN_REASONS])
