"""What every section of workflows.yaml is."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Share = Annotated[float, Field(ge=0.0, le=1.0)]


class Section(BaseModel):
    """Refuses unknown keys; cannot be changed once checked."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)
