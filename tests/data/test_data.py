"""Prompts and pairs: every format, the parts of a batch, and whose conditioning a picture gets."""

import io
import itertools
import json
import os
import subprocess
import sys
import tarfile

import pyarrow
import pyarrow.parquet
import pytest
import torch
from PIL import Image

from sid_train.core.rng import BatchRNG
from sid_train.data.captions import CAPTION_LIMIT
from sid_train.data.pairs import RowPicker, load_pairs
from sid_train.data.pictures import bucket_sizes, cut_out, expand_braces, nearest_bucket, open_pictures
from sid_train.data.prompts import load_prompts
from sid_train.data.rows import EAGER_LIMIT, LiveRows, PromptTable, encode_prompts, load_prompt_table
from sid_train.method.config import GANConfig, MethodConfig
from sid_train.method.sid import Distiller
from sid_train.models.conditioning import Conditioning
from sid_train.models.digits.data import COLOURS, DIGITS, TRAINING_SUBJECTS
from sid_train.models.digits.layout import DigitCodec, DigitConditioner
from sid_train.models.families import load_model

TEXTS = ["a red cat, asleep", "  a dog ", "", "a red cat, asleep", "ein Käfer", " "]
PROMPTS = ["a red cat, asleep", "a dog", "ein Käfer"]


# -- prompts -----------------------------------------------------------------------------------------------------


def write_txt(folder):
    (folder / "p.txt").write_text("\n".join(TEXTS), encoding="utf-8-sig")
    return folder / "p.txt"


def write_jsonl(folder, key="prompt"):
    (folder / "p.jsonl").write_text("\n".join(json.dumps({"id": 1, key: t}) for t in TEXTS) + "\n\n")
    return folder / "p.jsonl"


def write_csv(folder):
    quoted = "\n".join(f'{i},"{t}"' for i, t in enumerate(TEXTS))
    (folder / "p.csv").write_text(f"id,caption\n{quoted}\n", encoding="utf-8")
    return folder / "p.csv"


def write_parquet(folder):
    values = [t or None for t in TEXTS]  # null counts as empty
    pyarrow.parquet.write_table(pyarrow.table({"id": list(range(len(TEXTS))), "text": values}), folder / "p.parquet")
    return folder / "p.parquet"


def write_folder(folder):
    for i, text in enumerate(TEXTS):
        path = folder / "captions" / f"part{i // 3}" / f"{i}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n", encoding="utf-8")
    (folder / "captions" / "0.jpg").write_bytes(b"not read")
    return folder / "captions"


def write_data_set(folder):
    """A data set of the Hugging Face kind, on disk: ``datasets`` reads a hub id and a folder alike."""
    (folder / "set").mkdir()
    write_jsonl(folder / "set", "caption")
    return f"hf:{folder / 'set'}"


@pytest.mark.parametrize("write", [write_txt, write_jsonl, write_csv, write_parquet, write_folder, write_data_set])
def test_every_format_gives_the_same_prompts_and_reports_what_it_drops(write, tmp_path, capsys):
    source = str(write(tmp_path))
    assert load_prompts(source) == PROMPTS
    assert capsys.readouterr().out == ""
    load_prompts(source, report=True)
    assert capsys.readouterr().out == f"{source}: 3 prompts (1 duplicates and 2 empty ones dropped)\n"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.txt", " \n\n", r"p\.txt has no prompt, 2 empty one\(s\)"),
        ("p.txt", b"\xff\xfe\x00", r"p\.txt: expected UTF-8 text"),
        ("p.md", "a cat", r"expected 'demo', a \.txt, .*, got .*p\.md"),
        ("p.jsonl", '{"text": "a"}\n{"title": "b", "id": 2}', "line 2: expected prompt, .* found 'title', 'id'"),
        ("p.jsonl", '{"prompt": "a"}\n\nnot json', r"p\.jsonl, line 3: expected a JSON object .*, got 'not json'"),
        ("p.jsonl", '["a cat"]', "line 1: expected a JSON object"),
        ("p.jsonl", '{"caption": {"a": "b"}}', r"line 1: expected text, got \{'a': 'b'\}"),
        ("p.jsonl", '{"caption": "a cat \\ud83d"}', r"p\.jsonl, line 1: .* character 7 is half of one \(\\ud83d\)"),
        ("p.jsonl", '{"caption": ' + "[" * 100_000, r"p\.jsonl, line 1: expected a JSON object"),
        ("p.json", "[" * 100_000, r"p\.json: expected JSON, but .* nested too deeply"),
        ("p.json", '["a", 5]', r"p\.json, item 2: expected a JSON object"),
        ("p.json", '"a cat"', r"p\.json: expected a list of prompts or an object, got 'a cat'"),
        ("p.txt", "a" * (CAPTION_LIMIT + 1), r"p\.txt, line 1: expected a prompt of at most 1,048,576 characters"),
        ("p.txt", "version https://git-lfs.github.com/spec/v1\noid sha256:ab\n", r"p\.txt: .*git lfs pull"),
        ("p.csv", "\n<!DOCTYPE html><html>", r"p\.csv: expected text: it is a web page"),
        ("p.tar", "a cat", r"p\.tar: expected an uncompressed tar"),
        ("p.csv", "a cat\na dog\n", r"p\.csv, first line: expected prompt, caption or text, found 'a cat'"),
        ("p.csv", 'prompt\n"a cat', r"p\.csv: not a readable CSV file"),
        ("p.parquet", "a cat", r"p\.parquet: expected a Parquet file"),
        ("none/p.txt", None, "no file"),
        ("folder", None, "no file"),
    ],
)  # fmt: skip
def test_mistakes_in_prompt_files_are_named(name, content, message, tmp_path):
    if content is not None:
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message):
        load_prompts(str(tmp_path / name))


def test_a_table_without_a_text_column_lists_its_columns(tmp_path):
    pyarrow.parquet.write_table(pyarrow.table({"url": ["x"], "title": ["y"]}), tmp_path / "p.parquet")
    with pytest.raises(ValueError, match="expected prompt, caption or text, found 'url', 'title'"):
        load_prompts(str(tmp_path / "p.parquet"))
    (tmp_path / "new").mkdir()
    with pytest.raises(ValueError, match=r"holds no \.txt file"):
        load_prompts(str(tmp_path / "new"))


@pytest.mark.parametrize(
    ("package", "source", "message"),
    [("pyarrow.parquet", "p.parquet", "pip install pyarrow"), ("datasets", "hf:owner/name", "pip install datasets")],
)
def test_a_missing_package_is_named_with_its_command(package, source, message, tmp_path, monkeypatch):
    source = source if source.startswith("hf:") else str(write_parquet(tmp_path))
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ValueError, match=message):
        load_prompts(source)


def test_a_data_set_that_cannot_be_reached_is_one_line(tmp_path):
    code = "import sys\nfrom sid_train.data.prompts import load_prompts\ntry: load_prompts('hf:nobody/nothing')\n"
    code += "except ValueError as error: print(error)"
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=1800)
    assert run.stdout.startswith("data.prompts: hf:nobody/nothing: cannot read the train split"), run.stderr
    assert run.stdout.count("\n") == 1


# -- the table ---------------------------------------------------------------------------------------------------


class CountingConditioner(DigitConditioner):
    """The demo's conditioner, and how many prompts it encoded."""

    count = 0

    def encode(self, prompts):
        self.count += len(prompts)
        return super().encode(prompts)


def same(a: Conditioning, b: Conditioning) -> bool:
    return torch.equal(a.text, b.text) and torch.equal(a.pooled, b.pooled) and torch.equal(a.time_ids, b.time_ids)


def demo_prompts(count: int) -> list[str]:
    """As many different prompts in the demo's words."""
    words = [*DIGITS, *COLOURS]
    return [" ".join(p) for p in itertools.islice(itertools.product(words, repeat=4), count)]


def test_one_process_draws_as_it_always_did(conditioner):
    prompts = [s.prompt for s in TRAINING_SUBJECTS]
    table = PromptTable(prompts, LiveRows(prompts, conditioner), conditioner.encode([""]))
    ours, plain = torch.Generator().manual_seed(3), torch.Generator().manual_seed(3)
    index = torch.randint(len(prompts), (8,), generator=plain)
    assert same(table.draw(8, BatchRNG(ours)), conditioner.encode(prompts)[index])
    assert torch.equal(ours.get_state(), plain.get_state())


@pytest.mark.parametrize("parts", [2, 3])
def test_parts_draw_the_rows_of_one_batch(parts, conditioner, tmp_path):
    prompts = demo_prompts(31)
    table = PromptTable(prompts, LiveRows(prompts, conditioner), conditioner.encode([""]))
    pictures = load_pairs(str(write_captioned(tmp_path)), load_model("demo"), buckets=True).picker
    digits = load_pairs("demo", load_model("demo"))

    def draw(part: int, parts: int, count: int) -> tuple:
        rng = BatchRNG(torch.Generator().manual_seed(0), part, parts)
        rows, noise = table.draw_rows(count, rng), rng.randn(count, 2)
        real = digits.draw(count, rng)
        return rows, pictures.draw(count, rng), noise, real.latents, real.cond.text

    whole, split = draw(0, 1, 12), [draw(part, parts, 12 // parts) for part in range(parts)]
    for together, apart in zip(whole, zip(*split, strict=True), strict=True):
        if isinstance(together, list):
            assert together == [row for rows in apart for row in rows]
            assert len(set(together)) > 1
        else:
            assert torch.equal(together, torch.cat(apart))


def test_a_long_list_is_encoded_when_it_is_drawn(conditioner):
    counting = CountingConditioner()
    counting.load_state_dict(conditioner.state_dict())
    short, long = (LiveRows(demo_prompts(n), counting) for n in (EAGER_LIMIT, EAGER_LIMIT + 1))
    assert counting.count == EAGER_LIMIT
    rows = [4000, 5, 5, 17]
    assert same(short.read(rows), long.read(rows))
    assert counting.count == EAGER_LIMIT + len(rows)


# -- pictures ----------------------------------------------------------------------------------------------------

SIZES = [(40, 24), (24, 24), (20, 50), (64, 16), (18, 18), (16, 40)]  # width, height
CAPTIONS = [s.prompt for s in TRAINING_SUBJECTS[:: len(TRAINING_SUBJECTS) // len(SIZES)]][: len(SIZES)]


def picture(i: int) -> Image.Image:
    """A picture of one colour: which one it is can be read off its latents."""
    return Image.new("RGB", SIZES[i], (40 * i, 255 - 40 * i, 128))


def picture_bytes(i: int) -> bytes:
    buffer = io.BytesIO()
    picture(i).save(buffer, format="PNG")
    return buffer.getvalue()


def write_captioned(folder):
    for i, caption in enumerate(CAPTIONS):
        path = folder / "pictures" / f"part{i // 4}" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture_bytes(i))
        path.with_suffix(".txt").write_text(caption + "\n")
    return folder / "pictures"


def write_metadata(folder):
    (folder / "train").mkdir()
    keys = itertools.cycle(["text", "caption", "prompt"])
    lines = []
    for i, caption in enumerate(CAPTIONS):
        (folder / "train" / f"{i}.PNG").write_bytes(picture_bytes(i))
        lines.append(json.dumps({"file_name": f"train/{i}.PNG", next(keys): caption}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


def add_to_tar(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def write_tars(folder):
    (folder / "shards").mkdir()
    for shard in range(2):
        with tarfile.open(folder / "shards" / f"{shard:05d}.tar", "w") as tar:
            for i in range(3 * shard, 3 * shard + 3):
                caption = [("txt", CAPTIONS[i]), ("json", json.dumps({"caption": CAPTIONS[i]}))][shard]
                add_to_tar(tar, f"./set/{i:03d}.{caption[0]}", caption[1].encode())
                add_to_tar(tar, f"./set/{i:03d}.png", picture_bytes(i))
                add_to_tar(tar, f"./set/{i:03d}.cls", b"7")
    return folder / "shards"


def write_tar_braces(folder):
    return f"{write_tars(folder)}/{{00000..00001}}.tar"


def write_picture_parquet(folder, struct=False):
    (folder / "tables").mkdir()
    for part in range(2):
        rows = range(3 * part, 3 * part + 3)
        images = [{"bytes": picture_bytes(i), "path": f"{i}.png"} if struct else picture_bytes(i) for i in rows]
        table = pyarrow.table({"image": images, "caption": [CAPTIONS[i] for i in rows]})
        pyarrow.parquet.write_table(table, folder / "tables" / f"{part}.parquet", row_group_size=2)
    return folder / "tables"


def write_hub_parquet(folder):
    return write_picture_parquet(folder, struct=True)


FORMATS = [write_captioned, write_metadata, write_tars, write_tar_braces, write_picture_parquet, write_hub_parquet]


@pytest.mark.parametrize("write", FORMATS)
def test_every_format_gives_the_same_pictures_and_captions(write, tmp_path):
    pictures = open_pictures(str(write(tmp_path)))
    assert [entry.caption for entry in pictures.entries] == CAPTIONS
    for i in (5, 0, 3, 1, 2, 4):  # in any order
        assert pictures.read(i).tobytes() == picture(i).tobytes()
        assert pictures.read(i).size == SIZES[i]


def test_braces():
    assert expand_braces("a/{08..11}.tar") == ["a/08.tar", "a/09.tar", "a/10.tar", "a/11.tar"]
    assert expand_braces("{0..1}/{0..1}") == ["0/0", "0/1", "1/0", "1/1"]
    with pytest.raises(ValueError, match=r"expected rising numbers, got \{2\.\.1\}"):
        expand_braces("{2..1}.tar")


def truncated(folder):
    path = folder / "part0" / "2.png"
    path.write_bytes(path.read_bytes()[:60])


def no_picture(folder):
    (folder / "part0" / "2.png").write_text("not a picture")


@pytest.mark.parametrize("damage", [truncated, no_picture])
@pytest.mark.parametrize("buckets", [False, True])
def test_an_unreadable_picture_stops_with_its_name(damage, buckets, tmp_path):
    folder = write_captioned(tmp_path)
    damage(folder)
    with pytest.raises(ValueError, match=r"part0/2\.png: expected a readable picture"):
        load_pairs(str(folder), load_model("demo"), buckets).draw(64, BatchRNG(torch.Generator().manual_seed(0)))


@pytest.mark.parametrize(
    ("change", "source", "message"),
    [
        (lambda f: (f / "part0/1.txt").unlink(), "", r"1\.png: expected its caption in 1\.txt"),
        (lambda f: (f / "part0/1.txt").write_text(" \n"), "", r"1\.png: its caption is empty"),
        (lambda f: (f / "part0/1.txt").write_bytes(b"\xff"), "", r"1\.txt: expected UTF-8"),
        (lambda f: (f / "x.tar").write_text(""), "", "holds more than one of these"),
        (lambda f: (f / "x.tar").write_text("text"), "x.tar", r"x\.tar: expected an uncompressed tar"),
        (lambda f: (f / "x.parquet").write_text("text"), "x.parquet", r"x\.parquet: expected a Parquet file"),
        (lambda f: (f / "metadata.jsonl").write_text('{"file_name": "no.png"}'), "", "line 1: there is no file"),
        (lambda f: (f / "metadata.jsonl").write_text('{"text": "a"}'), "", "line 1: expected the picture's path"),
        (lambda f: (f / "metadata.jsonl").write_text('{"file_name": "part0/1.png"}'), "", "found 'file_name'"),
        (lambda f: None, "{0..1}.tar", r"there is no file .*0\.tar"),
        (lambda f: None, "none", "there is no folder"),
        (lambda f: (f / "new").mkdir(), "new", "holds none of them"),
    ],
)  # fmt: skip
def test_mistakes_in_pictures_are_named(change, source, message, tmp_path):
    folder = write_captioned(tmp_path)
    change(folder)
    with pytest.raises(ValueError, match=message):
        open_pictures(str(folder / source) if source else str(folder))


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"a.png": b"x"}, r"x\.tar: the sample 'a' has no caption"),
        ({"a.txt": b"x"}, r"x\.tar: the sample 'a' has no picture"),
        ({"a.png": b"x", "a.jpg": b"x", "a.txt": b"x"}, "has another picture"),
        ({"a.png": b"x", "a.json": b"{"}, r"a\.json: expected UTF-8 text, or a JSON object"),
        ({"a.png": b"x", "a.json": b'{"title": "x"}'}, r"a\.json: expected prompt, caption or text, found 'title'"),
        ({"a.png": b"x", "a.txt": b"\xff"}, r"a\.txt: expected UTF-8 text"),
    ],
)
def test_mistakes_in_shards_are_named(members, message, tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for name, data in members.items():
            add_to_tar(tar, name, data)
    with pytest.raises(ValueError, match=message):
        open_pictures(str(tmp_path / "x.tar"))


def test_parquet_without_pictures_lists_its_columns(tmp_path):
    pyarrow.parquet.write_table(pyarrow.table({"url": ["x"], "text": ["y"]}), tmp_path / "p.parquet")
    with pytest.raises(ValueError, match=r"expected a column of pictures .*, found url, text"):
        open_pictures(str(tmp_path / "p.parquet"))
    pyarrow.parquet.write_table(pyarrow.table({"image": ["x.png"], "text": ["y"]}), tmp_path / "p.parquet")
    with pytest.raises(ValueError, match=r"p\.parquet, row 0: .*expected bytes in column 'image', got str"):
        open_pictures(str(tmp_path / "p.parquet")).read(0)


def test_the_middle_is_cut_out_and_time_ids_tell_it():
    image = Image.new("RGB", (64, 32), (255, 0, 0))
    image.paste((0, 0, 255), (16, 0, 48, 32))  # the middle half is blue
    pixels, time_ids = cut_out(image, (16, 16))
    assert pixels.shape == (3, 16, 16)
    assert torch.equal(pixels[:, :, 4:12], torch.tensor([-1.0, -1.0, 1.0])[:, None, None].expand(3, 16, 8))
    assert time_ids == [32, 64, 0, 8, 16, 16]
    assert cut_out(image, (16, 32))[1] == [32, 64, 0, 0, 16, 32]
    assert cut_out(image.rotate(90, expand=True), (16, 16))[1] == [64, 32, 8, 0, 16, 16]


def test_exif_orientation_is_followed(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    Image.new("RGB", (40, 20)).save(tmp_path / "a.jpg", exif=exif)
    (tmp_path / "a.txt").write_text("a cat")
    assert open_pictures(str(tmp_path)).read(0).size == (20, 40)


def test_buckets_are_those_of_the_sdxl_paper():
    paper = [
        (512, 2048), (512, 1984), (512, 1920), (512, 1856), (576, 1792), (576, 1728), (576, 1664), (640, 1600),
        (640, 1536), (704, 1472), (704, 1408), (704, 1344), (768, 1344), (768, 1280), (832, 1216), (832, 1152),
        (896, 1152), (896, 1088), (960, 1088), (960, 1024), (1024, 1024),
    ]  # fmt: skip
    buckets = bucket_sizes((1024, 1024), 8)
    assert set(buckets) == set(paper) | {size[::-1] for size in paper}
    assert nearest_bucket((2000, 3000), buckets) == (832, 1216)
    assert nearest_bucket((100, 5000), buckets) == (512, 2048)
    assert nearest_bucket((300, 300), buckets) == (1024, 1024)
    for size in ((512, 512), (768, 768), (256, 256), (832, 1216)):
        assert size in bucket_sizes(size, 8)
    assert bucket_sizes((16, 16), 2) == [(8, 32), (16, 16), (32, 8)]


# -- pairs -------------------------------------------------------------------------------------------------------


def which_picture(latents) -> list[int]:
    """The pictures that latents of the demo's codec came from, by their colour."""
    red = DigitCodec().decode(latents)[:, 0].mean((1, 2))
    return [round(value) for value in ((red + 1) * 127.5 / 40).tolist()]


@pytest.mark.parametrize("write", FORMATS)
def test_each_picture_keeps_its_own_conditioning(write, tmp_path):
    bundle = load_model("demo")
    pairs = load_pairs(str(write(tmp_path)), bundle)
    batch = pairs.draw(32, BatchRNG(torch.Generator().manual_seed(0)))
    drawn = which_picture(batch.latents)
    assert len(set(drawn)) == len(CAPTIONS)
    assert same(batch.cond, bundle.conditioner.encode([CAPTIONS[i] for i in drawn]))


def test_a_bucketed_batch_has_one_size_and_its_time_ids(tmp_path):
    bundle = load_model("demo")
    pairs = load_pairs(str(write_captioned(tmp_path)), bundle, buckets=True)
    rng = BatchRNG(torch.Generator().manual_seed(0))
    seen = set()
    for _ in range(40):
        batch = pairs.draw(3, rng)
        height, width = (2 * n for n in batch.latents.shape[2:])
        drawn = which_picture(batch.latents)
        seen |= {(i, height, width) for i in drawn}
        expected = bundle.conditioner.encode([CAPTIONS[i] for i in drawn])
        assert torch.equal(batch.cond.text, expected.text)
        assert torch.equal(batch.cond.pooled, expected.pooled)
        for i, ids in zip(drawn, batch.cond.time_ids.tolist(), strict=True):
            assert ids == cut_out(picture(i), (height, width))[1]
            assert ids[:2] == [SIZES[i][1], SIZES[i][0]]
    assert seen == {(0, 16, 16), (1, 16, 16), (2, 32, 8), (3, 8, 32), (4, 16, 16), (5, 32, 8)}


def test_all_parts_of_a_batch_are_from_one_group():
    groups = ["wide", "tall", "wide", "wide", "tall", "tall", "wide"]
    picker, seen = RowPicker(groups), set()
    for seed in range(20):
        parts = [picker.draw(4, BatchRNG(torch.Generator().manual_seed(seed), part, 2)) for part in range(2)]
        assert len({groups[row] for part in parts for row in part}) == 1
        seen |= {row for part in parts for row in part}
    assert seen == set(range(len(groups)))


@pytest.mark.parametrize("buckets", [False, True])
def test_the_discriminator_sees_each_real_picture_under_its_own_text(buckets, tmp_path, make_denoiser, record_calls):
    """From the files to the network: what is noised and what it is told belong together, in other sizes too."""
    bundle = load_model("demo")
    folder = write_captioned(tmp_path)
    networks = [make_denoiser(seed) for seed in range(3)]
    unconditional = bundle.unconditional("empty")
    distiller = Distiller(
        *networks, bundle.denoiser.schedule, unconditional, bundle.latent_shape,
        MethodConfig(steps=1, guidance="zero-cfg", t_min=20, t_max=21), GANConfig(generator_weight=0.01),
    )  # fmt: skip
    calls = record_calls(networks[1])
    pairs, rng = load_pairs(str(folder), bundle, buckets), BatchRNG(torch.Generator().manual_seed(0))
    shapes = set()
    for _ in range(20):
        calls.clear()
        losses = distiller.fake_score_loss(bundle.conditioner.encode(CAPTIONS[:4]), 1, rng, pairs.draw(4, rng))
        assert all(value.isfinite() for value in losses.values())
        (real,) = [c for c in calls if c.call == "logits" and not torch.equal(c.x, calls[0].x)]
        drawn = which_picture(real.x)  # the noise at t = 20 is too weak to change that
        assert torch.equal(real.cond.text, bundle.conditioner.encode([CAPTIONS[i] for i in drawn]).text)
        shapes.add(tuple(real.x.shape[2:]))
        if buckets:
            assert real.cond.time_ids[:, :2].tolist() == [[SIZES[i][1], SIZES[i][0]] for i in drawn]
            assert real.cond.time_ids[:, 4:].tolist() == [[2 * n for n in real.x.shape[2:]]] * 4
    assert len(shapes) == (3 if buckets else 1)


def test_the_demo_pairs_know_no_buckets_and_no_cache():
    bundle = load_model("demo")
    with pytest.raises(ValueError, match=r"data\.buckets: the demo's pictures"):
        load_pairs("demo", bundle, buckets=True)
    with pytest.raises(ValueError, match=r"data\.cache: the demo's pictures"):
        load_pairs("demo", bundle, cache="x")


def test_the_table_of_a_configuration(conditioner):
    from sid_train.data.config import DataConfig

    table = load_prompt_table(DataConfig(), load_model("demo"), "zeros")
    assert table.prompts == [s.prompt for s in TRAINING_SUBJECTS]
    assert not table.unconditional.text.any()
    assert same(table.read([3, 1]), encode_prompts(load_model("demo").conditioner, [table.prompts[i] for i in (3, 1)]))
