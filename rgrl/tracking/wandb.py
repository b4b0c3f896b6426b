"""Weights & Biases, in whatever mode its own settings say; offline without an account."""

import os
import secrets
from pathlib import Path
from typing import Any, Literal

from rgrl.config import Config, to_dict
from rgrl.console import warn

PATIENCE = 120.0  # seconds that the end of a run waits for W&B to take what is left


class WandbSink:
    """Sends metrics and tables to W&B (`rgrl.tracking.Sink`)."""

    def __init__(self, config: Config) -> None:
        self.folder = Path(config.run.output_dir)
        self.run = _start(config, self.folder)
        self.where = "off"  # how its own settings call that: disabled
        if not self.run.disabled:
            self.where = f"offline, in {self.folder / 'wandb'}" if self.run.offline else self.run.url

    def log(self, step: int, metrics: dict[str, float | None]) -> None:
        """Send one step's metrics."""
        self.run.log(metrics, step=step)

    def table(self, step: int, name: str, rows: list[dict[str, Any]]) -> None:
        """Send one table of completions."""
        import wandb

        columns = list(rows[0])
        data = [[row[column] for column in columns] for row in rows]
        self.run.log({f"completions/{name}": wandb.Table(columns=[*columns], data=data)}, step=step)

    def close(self) -> None:
        """End W&B's run."""
        try:
            self.run.finish()
        except TimeoutError:
            warn(f"W&B has not taken everything: send the rest with `wandb sync {self.folder / 'wandb'}/run-*`")


def chosen_mode() -> Literal["offline"] | None:
    """None: as W&B's own settings say; offline where they say nothing and there is no account."""
    import wandb

    asked = os.environ.get("WANDB_MODE") or wandb.setup().settings.mode not in (None, "online", "shared")
    return None if asked or wandb.login(prompt=False, verify=False) else "offline"


def _start(config: Config, folder: Path) -> Any:
    import wandb

    id_file = folder / "wandb_id.txt"
    run_id = id_file.read_text().strip() if id_file.exists() else ""
    if not run_id:
        run_id = secrets.token_hex(4)
        id_file.write_text(run_id)
    mode = chosen_mode()

    def begin(mode: Literal["offline"] | None) -> Any:
        return wandb.init(
            project=config.tracking.project,
            name=config.tracking.name or folder.name,
            id=run_id,
            resume="allow",
            dir=str(folder),
            config=to_dict(config),
            mode=mode,
            settings=wandb.Settings(silent=True, finish_timeout=PATIENCE, finish_timeout_raises=True),
        )

    try:
        return begin(mode)
    except wandb.errors.CommError as error:
        reason = " ".join(str(error).split())
        warn(f"W&B cannot be reached and keeps its record in {folder / 'wandb'}, for `wandb sync`: {reason}")
        return begin("offline")
