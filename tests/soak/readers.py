"""All readers of strangers' files; here those of what the trainer stored, and of configurations."""

from __future__ import annotations

from pathlib import Path

import common
from data_readers import picture_readers, prompt_readers
from model_readers import model_readers
from mutate import Input
from processes import run
from reader import Reader, command, folder_of


def make_readers(work: Path) -> list[Reader]:
    """Makes the seeds in ``work``; takes half a minute."""
    return [
        *model_readers(work),
        *prompt_readers(work),
        *picture_readers(work),
        *_stored(work),
        *_configs(),
    ]


def _stored(work: Path) -> list[Reader]:
    from sid_train.config import load_config
    from sid_train.data.cache import Cache
    from sid_train.demo import run as demo
    from sid_train.training.run import RunFolder

    prompts, pairs = common.write_prompts(work / "prompts.txt"), common.write_pairs(work / "pairs")
    data = [f"data.prompts={prompts}", f"data.pairs={pairs}", "gan.generator_weight=0.01"]
    cache, folder = work / "cache", work / "run"
    arguments = ["--config", "demo", *common.settings(*data)]
    values = common.small(2, 1, "adapter.rank=1", "training.snapshot_every=1", f"data.prompts={prompts}")
    resumed = ["distill", "--config", "demo", *values]
    for made in (["encode", *arguments, "--shard-size", 3, "--out", cache], [*resumed, "--out", folder]):
        ended = run(made, work / "log", work)
        assert not ended.code, ended.output
    (folder / "generator.safetensors").unlink(missing_ok=True)
    facts = Cache(cache).facts
    of_run, of_cache = folder_of(folder), folder_of(cache)

    def read_cache(path: Path) -> list:
        found = Cache(path)
        found.expect(facts)
        rows = found.prompts().read([0, 3, 1])
        found.pairs()
        return [t.tolist() for c in (rows, found.unconditional("empty")) for t in c.tensors.values()]

    def read_run(path: Path) -> None:
        run = RunFolder(path)
        run.require_config(run.read_config())
        run.open_generator()
        run.open_generator(1)

    def read_demo(path: Path) -> None:
        demo._decide_iterations(load_config("demo"), path, 5.0)

    return [
        Reader("cache", [of_cache], "", read_cache, 2, same=True),
        Reader("run folder", [of_run], "", read_run, 0.4),
        Reader("resumed run", [of_run], "", lambda p: command(*resumed, "--out", p), 0.02, seconds=60),
        # Where nothing is known, some iterations are timed.
        Reader(
            "demo's iterations.json",
            [{"iterations.json": b'{"minutes": 5.0, "iterations": 3}'}],
            "",
            read_demo,
            0.3,
            seconds=60,
        ),
    ]


# -- configurations --------------------------------------------------------------------------------------------------


def _configs() -> list[Reader]:
    from sid_train import configs
    from sid_train.config import Config, load_config

    seeds: list[Input] = [{"given.toml": configs.path_of(name).read_bytes()} for name in configs.shipped()]
    seeds.append({"given.toml": Config().to_toml().encode()})
    lines = [f"{key}={value}" for key, value in Config().flat().items()]

    def read_sets(path: Path) -> None:
        if not path.is_file():  # made a pipe or a folder, which says no settings
            return
        with open(path, "rb") as file:
            values = file.read(1 << 20).decode(errors="surrogateescape").split("\n")
        load_config("demo", [v for v in values if v.strip()][:50])

    sets: list[Input] = [{"sets.toml": line.encode()} for line in lines]
    return [
        Reader("config", seeds, "given.toml", lambda p: load_config(str(p)), 3),
        Reader("--set", sets, "sets.toml", read_sets, 2, ("--set", ".")),
        Reader(
            "plan --config",
            seeds[:1],
            "given.toml",
            lambda p: command("plan", "--config", p, "--gpus", 1, "--gpu-memory", 24),
            0.005,
            seconds=60,
        ),
    ]
