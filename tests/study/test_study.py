"""The study with cells that are too short to say anything: that it runs, continues, and makes its page."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from sid_train.cli import main
from sid_train.demo import baselines
from sid_train.demo.report import FIGURES
from sid_train.study.cells import CELLS, TEACHER_CELLS, Cell
from sid_train.study.claims import CLAIMS, Claim
from sid_train.study.page import SETS, Figure, Table, write_page
from sid_train.study.run import Job, Results, cell_config, identity_of, run_study

SHORT = ("method.steps=1", "training.batch_size=2", "training.log_every=1")


@pytest.fixture(scope="module", autouse=True)
def few_pictures():
    """A row's figures of 256 pictures instead of 2,048, in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(baselines, "IMAGES", 256)
        baselines.evaluator_of.cache_clear()
        yield
    baselines.evaluator_of.cache_clear()


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """Two cells, one of which starts from the other, and a row of the teacher. The one that it starts from is not asked
    for.
    """
    out = tmp_path_factory.mktemp("study")
    first = Cell("k1", CELLS["k1"].group, "K = 1", SHORT, budget=0.02)
    second = replace(CELLS["any-step"], settings=(*SHORT, "method.any_steps=1,4"), budget=0.02, sampled=(1, 4))
    second = replace(second, starts_from="k1")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(CELLS, "k1", first)
        patch.setitem(CELLS, "any-step", second)
        jobs = [Job(TEACHER_CELLS["ladder-1"]), Job(second)]
        run_study(jobs, out, Results(out / "study.json"), workers=1)
        yield out, jobs


def test_a_cell_spends_its_network_calls_and_is_measured_at_its_steps(done):
    out, _ = done
    rows = json.loads((out / "study.json").read_text())["rows"]
    assert set(rows) == {"any-step/0", "k1/0", "ladder-1"}
    # Two updates of the fake score, of two calls each, and one of the generator, of three.
    assert (rows["k1/0"]["calls_an_iteration"], rows["k1/0"]["iterations"]) == (7, 4)
    # On average over 1, 4 and their steps the chain has 1.75 calls.
    assert rows["any-step/0"]["calls_an_iteration"] == pytest.approx(7 + 3 * 0.75)
    assert set(rows["any-step/0"]["figures"]) == {"1", "4"}
    for row in rows.values():
        for sets in row["figures"].values():
            assert all(set(figures) == set(FIGURES) for figures in sets.values())


def test_what_is_done_is_not_done_again(done, capsys):
    out, jobs = done
    before = (out / "study.json").read_bytes()
    run_study(jobs, out, Results(out / "study.json"), workers=1)
    assert "0 of 2 to run" in capsys.readouterr().out
    assert (out / "study.json").read_bytes() == before


def test_a_cell_that_was_changed_is_another(done):
    out, jobs = done
    results = Results(out / "study.json")
    assert results.figures_of(jobs[1]) is not None
    assert results.figures_of(Job(replace(jobs[1].cell, budget=0.03))) is None
    assert results.figures_of(Job(replace(jobs[1].cell, settings=("method.t_init=999",)))) is None
    assert results.figures_of(Job(replace(jobs[1].cell, told="in other words"))) is not None


def test_a_cell_that_fails_costs_no_other_cell(tmp_path):
    lost = Cell("lost", CELLS["k1"].group, "has no start", ("model.init_generator=none.safetensors",))
    results = Results(tmp_path / "study.json")
    with pytest.raises(
        ValueError, match=r"1 of the study's jobs failed: lost/0 \(model\.init_generator: none.*tries again"
    ):
        run_study([Job(lost), Job(TEACHER_CELLS["ladder-1"])], tmp_path, results, workers=1)
    assert set(Results(tmp_path / "study.json").rows) == {"ladder-1"}


def test_processes_tell_of_every_cell(tmp_path):
    """Two that cannot start: one that ends well takes each process half a minute to measure."""
    cells = [Cell(name, CELLS["k1"].group, "", ("model.init_generator=none.safetensors",)) for name in ("a", "b")]
    with pytest.raises(ValueError, match=r"2 of the study's jobs failed: (?=.*a/0 \(model).*b/0 \(model"):
        run_study([Job(cell) for cell in cells], tmp_path, Results(tmp_path / "study.json"), workers=2)


def test_the_page_is_made_of_the_figures_alone(done, tmp_path):
    out, _ = done
    results = Results(out / "study.json")
    write_page(results, tmp_path / "study.md")
    page = (tmp_path / "study.md").read_text()
    frechet = results.rows["k1/0"]["figures"]["1"]["held_out"]["frechet"]
    assert f"| `k1` | K = 1 | 1 | {frechet:.3f} / " in page
    assert page.count("| `any-step` |") == 2
    drawn = (tmp_path / "study" / "guidance.svg").read_bytes()
    write_page(results, tmp_path / "study.md")
    assert (tmp_path / "study" / "guidance.svg").read_bytes() == drawn
    assert page.count("](study/") == 2


def test_figures_of_another_teacher_are_not_mixed(tmp_path):
    path = tmp_path / "study.json"
    path.write_text(json.dumps({"made_with": {"teacher": "another"}, "rows": {}}))
    with pytest.raises(ValueError, match=r"study\.json: its figures are of another teacher, classifier or budget"):
        Results(path)


@pytest.mark.parametrize("claim", CLAIMS, ids=lambda claim: claim.told)
def test_a_claim_is_of_rows_that_there_are(claim):
    cells = {**CELLS, **TEACHER_CELLS}
    for name, steps in (claim.better, claim.worse):
        cell = cells[name]
        own = (cell.steps,) if name in TEACHER_CELLS else cell.sampled
        assert steps in (own or (cell_config(replace(cell, starts_from=""), 0, Path()).method.steps,))


def test_what_is_found_of_a_claim():
    lower, higher = Claim("", "", ("a", 1), ("b", 1)), Claim("", "", ("a", 1), ("b", 1), "recall")
    assert [lower.verdict(-0.2, 0.1), lower.verdict(0.2, 0.1), lower.verdict(0.2, 0.3)] == [
        "better",
        "worse",
        "not told apart",
    ]
    assert [higher.verdict(-0.2, 0.1), higher.verdict(0.2, 0.1)] == ["worse", "better"]


def test_differences_are_of_the_same_seed(tmp_path):
    """And of the teacher's one row beside every seed."""
    results = Results(tmp_path / "study.json")
    frechet = {"k4": {0: 1.0, 1: 2.0}, "dmd2": {1: 2.5, 0: 1.25, 2: 9.0}}
    for name, by_seed in frechet.items():
        for seed, value in by_seed.items():
            figures = {"4": {prompts: dict.fromkeys(FIGURES, value) for prompts in SETS}}
            results.add(f"{name}/{seed}", {"cell": identity_of(CELLS[name]), "figures": figures})
    row = {"30": {prompts: dict.fromkeys(FIGURES, 0.5) for prompts in SETS}}
    results.add("teacher-30-1", {"cell": identity_of(TEACHER_CELLS["teacher-30-1"]), "figures": row})
    table = Table(results)
    assert table.difference(Claim("", "", ("k4", 4), ("dmd2", 4)), "trained").values == [-0.25, -0.5]
    assert table.difference(Claim("", "", ("k4", 4), ("teacher-30-1", 30)), "trained").values == [0.5, 1.5]
    assert table.difference(Claim("", "", ("k4", 4), ("final", 4)), "trained") is None


def test_intervals_are_those_of_students_t():
    figure = Figure([1.0, 2.0, 3.0])
    assert (figure.mean, figure.half_width) == (2.0, pytest.approx(4.3027 / 3**0.5, rel=1e-4))
    assert Figure([1.0]).text(".2f") == "1.00"


@pytest.mark.parametrize("cell", CELLS.values(), ids=lambda cell: cell.name)
def test_every_cell_is_a_configuration(cell, tmp_path):
    config = cell_config(replace(cell, starts_from=""), 0, tmp_path)
    assert config.method.steps in (cell.sampled or (config.method.steps,))


def test_mistakes(tmp_path, capsys):
    assert main(["study", "--only", "k5", "--out", str(tmp_path)]) == 2
    assert "--only: no cell is called 'k5'" in capsys.readouterr().err
    assert main(["study", "--quick", "--only", "k4", "--out", str(tmp_path)]) == 2
    assert "--quick: runs k4, k1" in capsys.readouterr().err
    assert main(["study", "--workers", "0", "--out", str(tmp_path)]) == 2
