"""The recipe's section `checkpoint`."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, NonNegativeFloat, model_validator

from pretrain.data.stores.config import Location
from pretrain.quantities import Tokens


class CheckpointConfig(BaseModel):
    """When checkpoints are written, how, and how many are kept."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    every_tokens: Tokens | None = None
    """Tokens between checkpoints; none: only at the end."""

    keep: int = Field(default=3, ge=1)
    """How many of the newest stay; older ones are removed once a newer one is whole. The last one of each phase stays
    in any case, so that the phases behind it can be run again."""

    keep_every_tokens: Tokens | None = None
    """Of the checkpoints, the first at or behind each multiple of so many tokens of the run stays for good; none: none
    does for that."""

    asynchronous: bool = True
    """Whether steps go on while a checkpoint is written: they wait only for the copy of weights and optimizer to the
    host's memory, of which a rank then needs as much more as it holds of them (12 bytes for each parameter that it
    steps). false: they wait until it is on the disk."""

    max_failed_saves: int = Field(default=3, ge=1)
    """How many checkpoints in a row may fail to be written (a full disk, say) until the run ends for it; before that it
    goes on, with an alarm, and the next one that is due is tried. The last one of a phase must not fail."""

    staging: Path | None = None
    """Folder on each node's own disk that ranks write their files to first; then a thread of each copies them into the
    run's folder, which stays the place that runs go on from. It is for run folders on slow or shared disks, with
    asynchronous false, where a node has no memory for the copies: steps then wait for its own disk alone. A
    subfolder for each run and rank takes the place of a checkpoint there; none: they are written into the run's folder.
    """

    upload: Location | None = None
    """Where a copy of each finished checkpoint goes: s3://BUCKET/PATH, gs://BUCKET/PATH (credentials, region and
    endpoint from the environment) or a folder, of this run alone. Threads of all ranks put the files there beside the
    steps, a share each, the manifest last. Where that fails it is told (`upload_failed` events) and tried again behind
    the next save; until a copy is there the checkpoint is not removed here, unless there is no room for the next one. A
    run begins by downloading the newest whole copy if it is newer than what its folder holds, as on a new node. The
    fence that keeps an old copy of a run from publishing is in the run's folder: it guards the store only where all
    copies of the run see that folder."""

    upload_keep: int | None = Field(default=None, ge=1)
    """How many of the newest copies stay behind `upload`, beside those that are kept for good here; none: all."""

    upload_wait_seconds: NonNegativeFloat = 15.0
    """How long a run that is asked to stop (a signal, a time limit ahead) waits for its uploads. What is left is
    uploaded when the run goes on in its folder."""

    upload_end_wait_seconds: NonNegativeFloat = 1800.0
    """A run that has had its tokens waits for its uploads, with all its ranks, as long as they move, however slowly:
    where the store has taken no further piece (8 MiB of a file; a 9,000th of one above 75 GB) of any rank for so long,
    it ends with exit code 74. Asked to stop meanwhile, it waits upload_wait_seconds more, and ends with 75."""

    @model_validator(mode="after")
    def _upload_is_a_store(self) -> CheckpointConfig:
        if isinstance(self.upload, str) and not self.upload.startswith(("s3://", "gs://")):
            raise ValueError(f"upload {self.upload}: nothing can be put there; give s3://, gs:// or a folder")
        if self.upload is None:
            for name in ("upload_keep", "upload_wait_seconds", "upload_end_wait_seconds"):
                if (value := getattr(self, name)) != type(self).model_fields[name].default:
                    raise ValueError(f"{name} is {value}, but nothing is uploaded: set upload, or remove it")
        return self
