"""What a run's folder shows of the run to whoever looks in: logs, pictures and scores."""

from __future__ import annotations

from pathlib import Path

from ..evaluation.metric import CLIP_SCORE
from ..files.logs import read_log


class RunLayout:
    """Where it is. The training packages are not needed for it."""

    def __init__(self, path: Path):
        self.path = path
        self.config_file = path / "config.toml"
        self.log = path / "log.jsonl"
        self.alarms = path / "alarms.jsonl"
        self.looks = path / "looks.jsonl"
        self.snapshot_folder = path / "snapshots"

    def snapshots(self) -> list[int]:
        """The iterations of which the averaged generator is kept."""
        return sorted(int(path.name.partition(".")[0]) for path in self.snapshot_folder.glob("[0-9]*"))

    def best_snapshot(self) -> int:
        """The iteration of the snapshot with the highest CLIP score; 0 where none was scored, so that the last
        checkpoint is the best that is known.
        """
        scores = read_log(self.scores(CLIP_SCORE))
        return int(max(scores, key=lambda entry: entry[CLIP_SCORE])["iteration"]) if scores else 0

    def scores(self, metric: str) -> Path:
        """The log of a metric of the snapshots' pictures."""
        return self.path / ("clip.jsonl" if metric == CLIP_SCORE else f"scores-{metric}.jsonl")

    def grid(self, iteration: int) -> Path:
        return self.path / "grids" / f"{iteration:06d}.png"

    def newest_grid(self, iteration: int) -> Path | None:
        """The last grid up to ``iteration``: of that generator, or of the one that it was shortly before."""
        grids = (path for path in self.grid(0).parent.glob("*.png") if path.stem.isdecimal())
        return max((path for path in grids if int(path.stem) <= iteration), key=lambda p: int(p.stem), default=None)
