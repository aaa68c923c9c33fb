"""Settings of the doctor."""

from __future__ import annotations

from dataclasses import dataclass

from raycurv.driver.settings import ModelPath, Place, check_fields


@dataclass(frozen=True)
class DoctorSettings:
    """What is installed, what this machine has, and what a fit here could hold."""

    model: ModelPath | None = None
    """Say what a fit of this model would take: a directory with an HF config.json, its name on the
    hub, or `package.module:factory`. Default: how large a model of Llama's shape fits."""
    out: Place | None = None
    """Where results would go: look at its disk, too. Default: the working directory."""
    spool_dir: Place | None = None
    """Where a swept fit would keep what passes between stages: look at its disk, too."""
    address: str | None = None
    """Ray cluster: `auto` or `HOST:PORT` must answer, `local` is started and ended, `none` is not
    looked for. Default: tell whether one is running, and start none."""
    trust_remote_code: bool = False
    """Run the Python code that a model directory brings along, with all that you may do."""

    def check(self) -> None:
        """Refuse what cannot work, with a UserError that names the flag."""
        check_fields(self)
