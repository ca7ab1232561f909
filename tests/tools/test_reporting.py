"""Tables, and the documents that show them."""

import pytest

from tools.reporting import LEFT, fill_tables, table


def test_columns_are_aligned() -> None:
    rows = (["x", "1"] for _ in range(1))
    assert table(["a", "b"], rows) == "| a | b |\n| ---: | ---: |\n| x | 1 |"
    assert table(["a", "b"], [], LEFT) == "| a | b |\n|---|---|"


def test_a_table_replaces_what_its_block_held_and_nothing_else() -> None:
    document = "before\n<!-- table: here -->\nold\n<!-- end -->\n<!-- table: other -->\nkept\n<!-- end -->\n"
    assert fill_tables(document, {"here": "| \\1 |"}) == document.replace("old", "| \\1 |")
    with pytest.raises(ValueError, match=r"for gone$"):
        fill_tables(document, {"here": "new", "gone": "new"})
