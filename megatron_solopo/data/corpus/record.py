"""What the records of all formats share."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, StringConstraints

Text = Annotated[str, StringConstraints(min_length=1, pattern=r"\S")]


class Record(BaseModel):
    """A row as its file has it: no value is converted to another type, unknown keys are ignored."""

    model_config = ConfigDict(frozen=True, strict=True)
