"""Tests of issue 29 in data.py, to be folded into test_mope.py."""

import json
import os
import sys
from unittest import mock

import numpy as np
import torch
from PIL import Image

import data
import train
from mope import BERT, InputError, load_bert
from test_mope import (WORDS, arguments, ended, folder, make_bert, make_food, make_grocery, output,
                       read, refused, start, stop_in_the_first_step, write_rows)


def test_whatever_ends_sending_ends_the_program(root):
    """And a long TMPDIR, whose sockets would have too long a path, is no hindrance."""
    argv = arguments(root, "--epochs", "1", "--workers", "1", "--out", f"{root}/run")
    fail = ("from multiprocessing.reduction import ForkingPickler\n"
            "def fail(tensor): raise OSError('no more shared memory')\n"
            "ForkingPickler.register(torch.Tensor, fail)")
    _, said = ended(start(argv, fail), 1)
    assert "no more shared memory" in said and said.splitlines()[-1].startswith("error: DataLoader")
    temporary = root / ("x" * 80)
    temporary.mkdir()
    ended(start([*argv[:-1], f"{root}/other"], TMPDIR=str(temporary)))


def test_workers_share_the_samples_where_they_can(root):
    loader = data.loader(data.Batches(mock.Mock(), 1), None, workers=1)
    assert loader.multiprocessing_context.get_start_method() == "fork"
    for platform, workers in (("linux", 16), ("win32", 4)):
        with mock.patch("os.sched_getaffinity", return_value=set(range(64)), create=True):
            with mock.patch("sys.platform", platform):
                assert train.settings("food101", "mope")["workers"] == workers


def test_whole_pictures_are_held_out_and_no_class_is_lost(root):
    for i in range(40):
        Image.new("RGB", (8, 8)).save(root / f"{i}.png")

    def load(rows, **other) -> dict:
        for split, rows in {"train": rows, "test": rows[:3], **other}.items():
            rows = [{"image": f"{i}.png", "text": "x", "label": label} for i, label in rows]
            (root / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
        return data.load("jsonl", root)

    splits = load([(i, "ab"[i % 2]) for i in range(40) for _ in range(5)])
    train_, val, test = (data.pictures(splits[name].samples) for name in ("train", "val", "test"))
    assert len(splits["val"]) == 20 and len(val) == 4 and not val & train_
    assert "1 pictures are in training too" in splits["test"].notes[0] and not val & test
    splits = load([(i, str(i)) for i in range(36)] + [(i, "a") for i in range(36, 40)])
    assert [s.label for s in splits["val"].samples] == ["a"] and len(splits["train"]) == 39
    names = [["a", "b"], ["a"], ["b", "c"], ["a", "c"]] * 3 + [["d", "a"], ["e", "b"]]
    splits = load(list(enumerate(names)))
    assert {n for s in splits["train"].samples for n in s.label} == set("abcde")
    refused(lambda: load([(0, "a"), (1, "b")]), "held out", "val.jsonl")
    # rows with a picture of their own: those that 39949fe held out
    assert [s.id for s in load([(i, "ab"[i % 2]) for i in range(40)])["val"].samples] == [
        f"train.jsonl:{line}" for line in (5, 12, 25, 28)]
    (root / "val.jsonl").symlink_to(root / "nothing")
    (root / "dev.jsonl").write_text((root / "train.jsonl").read_text())
    refused(lambda: data.load("jsonl", root), "val.jsonl: no such file")


def test_labels_that_look_alike_are_told(root):
    write_rows(root, train=["Café", "cafe\u0301", "b", "b"], val="b", test="b")
    notes = data.load("jsonl", root)["train"].notes
    assert notes == ["1 classes differ from others in case or Unicode form alone",
                     "1 samples in the smallest class, 'Café'"]
    write_rows(root, train="aabb", val="ab", test=["B"])
    refused(lambda: data.load("jsonl", root), "'B'", "['b'] differ in case or Unicode form alone")
    write_rows(root, train=[["a", "b"], ["c"]], val=[["a"]], test=[["a", "ｃ"]])
    refused(lambda: data.load("jsonl", root), "'ｃ'", "['c'] differ in case")
    write_rows(root, train="aabb", val="ab", test="z")
    assert "differ" not in refused(lambda: data.load("jsonl", root), "'z'")
    write_rows(root, train=[["a"], []] * 4, val=[["a"]], test=[[]])
    splits = data.load("jsonl", root)
    assert [splits["train"].target(s.label).tolist() for s in splits["train"].samples] == [[1], [0]] * 4


def test_fit_and_flip(root):
    """What is seen of a picture four times as wide as high, with a column of each colour."""
    columns = np.arange(0, 256, 4, dtype=np.uint8)[None, :, None].repeat(16, 0).repeat(3, 2)
    Image.fromarray(columns).save(root / "wide.png")
    path, rng = root / "wide.png", np.random.default_rng(0)
    whole = data.decode(path, 32, fit="squeeze")
    assert torch.equal(whole, data.resize(columns, 32)) and whole[0, 0, 0] < 8 < 240 < whole[0, 0, -1]
    assert data.decode(path, 32)[0, 0, 0] > 80, "the centre"
    for source in (path, columns):
        seen = {data.decode(source, 32, rng, flip, "squeeze")[0, 0, 0].item() < 9
                for flip in (False, True) for _ in range(20)}
        assert seen == {True, False}
        assert all(data.decode(source, 32, rng, False, "squeeze").equal(whole) for _ in range(9))

    rows = [{"image": f"{i}.png", "text": "red " * (i + 1), "label": "ab"[i % 2]} for i in range(12)]
    for i in range(12):
        Image.new("RGB", (16, 24 + i)).save(root / f"{i}.png")
    for split in ("train", "val", "test"):
        (root / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    argv = arguments(root, "--dataset", "jsonl", "--data-dir", str(root), "--epochs", "1")
    said = output(lambda: train.main([*argv, "--out", "run", "--fit", "squeeze", "--no-flip",
                                      "--text-length", "10"]))
    assert "of 12 samples of test, 4 texts are cut at --text-length, and 11 pictures lose" in said
    config = read(root / "run/best.pt")["config"]
    assert (config["fit"], config["flip"]) == ("squeeze", False)
    decode = mock.patch("data.decode", side_effect=data.decode)
    with decode as seen:
        train.main(["--predict", f"{root}/test.jsonl", "--checkpoint", "run/best.pt"])
    assert {call.args[3:] for call in seen.call_args_list} == {(False, "squeeze")}
    for name in data.DATASETS:
        assert train.settings(name, "mope")["flip"] == data.DATASETS[name].flip


def test_a_tiff_is_turned_once(root):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees, clockwise
    corner = np.zeros((40, 40, 3), np.uint8)
    corner[:20, :20] = 255
    for form in ("TIFF", "PNG", "JPEG"):
        Image.fromarray(corner).save(root / "photo", form, exif=exif)
        seen = data.decode(root / "photo", 8)[0]
        assert seen[1, 6] > 200 and max(seen[1, 1], seen[6, 1], seen[6, 6]) < 50, form


def test_accents_are_drawn():
    letters = [np.array(data.font(20).getmask(letter)) for letter in "éü"]
    assert letters[0].shape != letters[1].shape or (letters[0] != letters[1]).any()


def test_a_file_is_asked_for_once(root):
    """And a folder without any of the pictures is told with the tree that is expected."""
    make_food(root)
    with mock.patch("os.stat", side_effect=os.stat) as asked:
        for pairs in data.load("food101", root).values():
            assert pairs.digest
    asked = [str(call.args[0]) for call in asked.call_args_list]
    assert 0 < sum("red_0.jpg" in path for path in asked) <= 2 * 2, "train and test have one each"
    (root / "images").rename(root / "elsewhere")
    refused(lambda: data.load("food101", root), "images/train", "Expected in", "kaggle")


def test_rows_say_what_they_lack(root):
    """A field that the model does not look at may be lacking; of its pictures none is opened."""
    for label in ([0, 1, 1, 0], [0, 1], [1], ["a", "b", "a"], [0.0, 1.0]):
        write_rows(root, train=[["a"], label], val=[["a"]], test=[["a"]])
        refused(lambda: data.load("jsonl", root), "train.jsonl:2", "give names")
    for field, only in (("image", "text"), ("text", "vision")):
        for change in ({field: None}, {}):
            rows = [{"image": "red.jpg", "text": "a", "label": c} for c in "ab"]
            rows.append({**{k: v for k, v in rows[0].items() if k != field}, **change})
            for split in ("train", "val", "test"):
                (root / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
            refused(lambda: data.load("jsonl", root), "train.jsonl:3", f"{field} is missing or null")
            pairs = data.load("jsonl", root, 8, only=only)["train"]
            with mock.patch("PIL.Image.open", side_effect=Image.open) as opened:
                _, image, text, _, damaged = pairs[2, 0]
            assert len(pairs) == 3 and not damaged and opened.called == (field == "text")
            assert text == "a" if field == "image" else text == ""
            assert (image[:, 0, 0].tolist() == list(data.GREY)) == (field == "image")


def test_methods_of_one_modality_need_one(root):
    argv = arguments(root, "--dataset", "jsonl", "--data-dir", f"{root}/rows", "--epochs", "1")
    write_rows(root / "rows", train="ab" * 12, val="ab", test="ab")
    rows = {path: path.read_text() for path in (root / "rows").glob("*.jsonl")}
    for field, method in (("image", "text-only"), ("text", "image-only")):
        for path in rows:
            path.write_text(rows[path].replace(f'"{field}"', '"unknown"'))
        for flags in ([], ["--method", method, "--head", "both"]):
            refused(lambda: train.main([*argv, "--out", "no", *flags]), f"{field} is missing")
        train.main([*argv, "--out", method, "--method", method])
        assert read(root / method / "results.json")["damaged_images"] == 0
        train.main(["--eval", "--checkpoint", f"{method}/best.pt"])


def test_labels_of_new_rows_are_ignored(root):
    write_rows(root, new=[1.0, "b", [0, 1], None])
    pairs = data.unlabelled([f"{root}/new.jsonl"], ["b", "c"], False)
    assert [pairs.sample(i).label for i in range(4)] == [None] * 4


def test_empty_descriptions_are_refused(root):
    make_grocery(root)
    (root / "dataset/Pear.txt").write_text(" \n")
    refused(lambda: data.load("grocery", root), "classes.csv:3", "Pear.txt is empty")


def test_settings_of_tokenizers_are_honoured_or_refused(root):
    bert = BERT(len(WORDS), 16, 1, 2, 16, 40)
    bert.folder = root
    make_bert(root)
    whole = data.load_tokenizer(bert, 16)
    words = "\n".join(WORDS)
    decoder = {"added_tokens_decoder": {"5": {"content": "a"}, "15": {"content": "[NEW]"}}}
    for name, content, *hints in (
            ("vocab.txt", words.replace("[UNK]", "unknown"), "no {'[UNK]'}"),
            ("added_tokens.json", {"smile": 15}, "smile", "tokenizer.json"),
            ("tokenizer_config.json", decoder, "[NEW]", "tokenizer.json"),
            ("config.json", {"tokenizer_class": "BertJapaneseTokenizer"}, "BertJapaneseTokenizer"),
            ("tokenizer_config.json", {"tokenizer_class": "MPNetTokenizer"}, "MPNetTokenizer"),
            ("1_Pooling/config.json", {"pooling_mode_cls_token": True}, "--pooling cls")):
        make_bert(root)
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_text(content if isinstance(content, str) else json.dumps(content))
        refused(lambda: data.load_tokenizer(bert, 16), "does not belong", *hints)
        (root / name).unlink()
    for vocabulary, ids in ((words.replace("photo", "Photo"), [2, 6, 1, 3]), (words, [2, 6, 6, 3])):
        (root / "vocab.txt").write_text(vocabulary)
        assert data.load_tokenizer(bert, 16).encode("Photo photo").ids == ids

    (root / "1_Pooling/config.json").write_text('{"pooling_mode_cls_token": true}')
    with mock.patch.object(bert, "pooling", "cls"):
        assert data.load_tokenizer(bert, 16).encode("a").ids == [2, 5, 3]
    (root / "1_Pooling/config.json").unlink()
    whole.save(str(root / "tokenizer.json"))
    for settings, ids in (({}, [2, 8, 3]), ({"do_lower_case": False}, [2, 1, 3]),
                          ({"tokenizer_class": "OtherTokenizer"}, [2, 8, 3])):
        (root / "tokenizer_config.json").write_text(json.dumps(settings))
        assert data.load_tokenizer(bert, 16).encode("RED").ids == ids, settings
    with mock.patch("huggingface_hub.snapshot_download", return_value=str(root)) as download:
        load_bert("someone/small-bert")
    assert {"added_tokens.json", "1_Pooling/config.json"} < {*download.call_args[1]["allow_patterns"]}


if __name__ == "__main__":
    sys.argv[0] = __file__
    for name, test in list(globals().items()):
        if name.startswith("test_") and (len(sys.argv) == 1 or any(w in name for w in sys.argv[1:])):
            with folder() as path:
                test(*[path] * test.__code__.co_argcount)
            print("ok", name, flush=True)
