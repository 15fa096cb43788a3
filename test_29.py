"""Tests of issue 29 in data.py, to be folded into test_mope.py."""

import json
import sys
from unittest import mock

import numpy as np
from PIL import Image

import data
import train
from mope import BERT, load_bert
from test_mope import (WORDS, arguments, ended, folder, make_bert, make_food, make_grocery, output,
                       read, refused, start, write_rows)


def test_whatever_ends_sending_ends_the_program(root):
    """And a long TMPDIR is no hindrance, though a socket's path has a limit."""
    argv = arguments(root, "--epochs", "1", "--workers", "1", "--out", f"{root}/run")
    fail = ("from multiprocessing.reduction import ForkingPickler\n"
            "ForkingPickler.register(torch.Tensor, lambda tensor: 1 / 0)")
    said = ended(start(argv, fail), 1)[1].splitlines()
    assert "division by zero" in said[-2] and said[-1].startswith("error: DataLoader")
    (root / ("x" * 80)).mkdir()
    ended(start([*argv[:-1], f"{root}/b"], TMPDIR=f"{root}/{'x' * 80}"))
    loader = data.loader(data.Batches(mock.Mock(), 1), None, workers=1)
    assert loader.multiprocessing_context.get_start_method() == "fork"
    with mock.patch("os.sched_getaffinity", return_value=range(64)):
        assert train.pick_workers(train.ONE_A_CORE) == 16
        with mock.patch("sys.platform", "win32"):
            assert train.pick_workers(train.ONE_A_CORE) == 4


def write_labels(root, train_, **other):
    """Write rows [(picture, label)] as train.jsonl, and as the other splits."""
    for split, rows in {"train": train_, **other}.items():
        rows = [{"image": f"{i}.png", "text": "x", "label": label} for i, label in rows]
        (root / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
        for row in rows:
            Image.new("RGB", (8, 8)).save(root / row["image"])


def test_whole_pictures_are_held_out_and_no_class_is_lost(root):
    rows = list(enumerate("ab" * 20))
    write_labels(root, rows * 5, test=rows[:3])
    splits = data.load("jsonl", root)
    ours, held, test = (data.pictures(splits[name].samples) for name in ("train", "val", "test"))
    assert len(splits["val"]) == 20 and len(held) == 4 and not held & (ours | test)
    assert splits["test"].notes == ["3 pictures are in training too: scores may be too good"]
    write_labels(root, rows)  # the same are held out as before, where no picture has two rows
    assert [s.id[-2:] for s in data.load("jsonl", root)["val"].samples] == [":5", "12", "25", "28"]
    labels = [*rows, *((i, f"{i}") for i in range(40, 90))]
    for labels in (labels, [(i, [label, "c"]) for i, label in labels]):
        write_labels(root, labels, test=labels)
        splits = data.load("jsonl", root)
        assert {*data.count_labels(splits["train"].samples)} == {*splits["train"].classes}
    write_labels(root, [(0, "a"), (1, "b")])
    refused(lambda: data.load("jsonl", root), "validation", "val.jsonl")
    (root / "val.jsonl").symlink_to("nothing")
    refused(lambda: data.load("jsonl", root), "val.jsonl: no such file")


def test_labels_are_told(root):
    for label in ([0, 1, 1, 0], [0, 1], [1], ["a", "b", "a"]):
        write_labels(root, [(0, ["a"]), (1, label)])
        refused(lambda: data.load("jsonl", root), "train.jsonl:2", "give names")
    write_labels(root, list(enumerate(["Café", "cafe\u0301", "b", "b"])), val=[(5, "b")],
                 test=[(6, "b")])
    assert data.load("jsonl", root)["train"].notes == [
        "1 classes differ from others in case or Unicode form alone",
        "1 samples in the smallest class, 'Café'"]
    for label, told in (("B", "['b'] differ in case or Unicode form alone"), ("z", "train")):
        write_labels(root, list(enumerate("aabb")), test=[(6, label)])
        assert refused(lambda: data.load("jsonl", root), repr(label)).endswith(told)
    write_labels(root, [(0, ["a"]), (1, [])], val=[(2, [])], test=[(3, [])])
    assert [data.load("jsonl", root)["train"][i, 0][3] for i in (0, 1)] == [1, 0]
    write_labels(root, [], new=[(0, 1.0), (1, "b"), (2, [0, 1])])
    pairs = data.unlabelled([f"{root}/new.jsonl"], ["b", "c"], False)
    assert [s.label for s in pairs.samples] == [None] * 3


def test_one_modality_is_enough_for_one(root):
    argv = arguments(root, "--dataset", "jsonl", "--data-dir", "rows", "--epochs", "1")
    write_rows(root / "rows", train="ab" * 12, val="ab", test="ab")
    rows = {path: path.read_text() for path in (root / "rows").glob("*.jsonl")}
    for field, method in (("image", "text-only"), ("text", "image-only")):
        for path in rows:
            path.write_text(rows[path].replace(f'"{field}"', '"other"'))
        for flags in ([], ["--method", method, "--head", "both"]):
            refused(lambda: train.main([*argv, *flags]), "train.jsonl:1", f"{field} is missing")
        with mock.patch("PIL.Image.open", side_effect=Image.open) as opened:
            train.main([*argv, "--out", method, "--method", method])
            train.main(["--eval", "--checkpoint", f"{method}/best.pt"])
        assert opened.called == (field == "text")
        assert read(root / method / "results.json")["damaged_images"] == 0


def test_settings_of_tokenizers_are_honoured_or_refused(root):
    bert = BERT(len(WORDS), 16, 1, 2, 16, 40)
    bert.folder, words = root, "\n".join(WORDS)
    (root / "1_Pooling").mkdir()
    make_bert(root)
    whole = data.load_tokenizer(bert, 16)
    new = {"added_tokens_decoder": {"0": {"content": "[PAD]"}, "15": {"content": "[NEW]"}}}
    for name, content, hint in (
            ("vocab.txt", words.replace("[UNK]", "unknown"), "no {'[UNK]'}"),
            ("added_tokens.json", {"smile": 15}, "no {'smile'}; a tokenizer.json"),
            ("tokenizer_config.json", new, "no {'[NEW]'}; a tokenizer.json"),
            ("config.json", {"tokenizer_class": "BertJapaneseTokenizer"}, "BertJapaneseTokenizer"),
            ("1_Pooling/config.json", {"pooling_mode_cls_token": True}, "--pooling cls")):
        make_bert(root)
        (root / name).write_text(content if name == "vocab.txt" else json.dumps(content))
        refused(lambda: data.load_tokenizer(bert, 16), "does not belong", hint)
        with mock.patch.object(bert, "pooling", "cls"):
            assert name[0] != "1" or data.load_tokenizer(bert, 16)
        (root / name).unlink()
    for vocabulary, ids in ((words, [2, 6, 6, 3]), (words.replace("ph", "Ph"), [2, 6, 1, 3])):
        (root / "vocab.txt").write_text(vocabulary)
        assert data.load_tokenizer(bert, 16).encode("Photo photo").ids == ids
    whole.save(str(root / "tokenizer.json"))
    for settings, ids in (({"tokenizer_class": "Any"}, [2, 8, 3]),
                          ({"do_lower_case": False}, [2, 1, 3])):
        (root / "tokenizer_config.json").write_text(json.dumps(settings))
        assert data.load_tokenizer(bert, 16).encode("RED").ids == ids
    make_bert(root)
    with mock.patch("huggingface_hub.snapshot_download", return_value=str(root)) as download:
        load_bert("someone/small-bert")
    asked = download.call_args[1]["allow_patterns"]
    assert {"added_tokens.json", "1_Pooling/config.json"} < {*asked}


def test_fit_and_flip(root):
    """They are stored; a wide picture with a column of each grey shows them."""
    wide = np.arange(256, dtype=np.uint8)[None, ::4, None].repeat(16, 0).repeat(3, 2)
    write_labels(root, [(0, "a"), (1, "b")] * 6, val=[(0, "a")], test=[(0, "a"), (1, "b")])
    for i in range(2):
        Image.fromarray(wide).save(root / f"{i}.png")
    argv = arguments(root, "--dataset", "jsonl", "--data-dir", ".", "--epochs", "1", "--out")
    for out, flag, seen in (("a", "--fit=squeeze", {True, False}), ("b", "--no-flip", {False})):
        said = output(lambda: train.main([*argv, out, flag]))
        assert "2 samples of test, 0 texts are cut at --text-length, and 2 pictures lose" in said
        pairs = data.load(**read(root / out / "best.pt")["config"])["train"]
        images = [pairs[i, epoch][1][0] for i in range(12) for epoch in range(3)]
        assert {bool(image[0, 0] > image[0, -1]) for image in images} == seen
        assert all(image.min() < 9 and image.max() > 246 for image in images) == (out == "a")
    tokenizer = data.load_tokenizer(load_bert("bert"), 2)
    assert "2 texts are cut" in data.unseen(data.load("jsonl", root)["test"], tokenizer)
    assert not train.settings("snli_ve", "mope")["flip"]


def test_a_tiff_is_turned_once(root):
    exif, corner = Image.Exif(), np.zeros((40, 40, 3), np.uint8)
    exif[0x0112], corner[:20, :20] = 6, 255  # to be turned by 90 degrees, clockwise
    Image.fromarray(corner).save(root / "a.tiff", exif=exif)
    seen = data.decode(root / "a.tiff", 8)[0]
    assert seen[1, 6] > 200 and max(seen[1, 1], seen[6, 1], seen[6, 6]) < 50


def test_files_are_asked_for_once_and_their_lack_is_told(root):
    make_food(root / "food")
    with mock.patch("os.stat", side_effect=__import__("os").stat) as asked:
        assert all(pairs.digest for pairs in data.load("food101", root / "food").values())
    paths = [str(call.args[0]) for call in asked.call_args_list]
    assert 0 < sum("train/red/red_0.jpg" in path for path in paths) <= 2
    (root / "food/images").rename(root / "elsewhere")
    refused(lambda: data.load("food101", root / "food"), "images/train", "Expected in", "kaggle")
    (make_grocery(root) / "dataset/Pear.txt").write_text(" \n")
    refused(lambda: data.load("grocery", root), "classes.csv:3", "Pear.txt is empty")


def test_accents_are_drawn():
    assert bytes(data.font(20).getmask("é")) != bytes(data.font(20).getmask("ü"))


if __name__ == "__main__":
    for name, test in list(globals().items()):
        if name.startswith("test_") and (len(sys.argv) == 1 or sys.argv[1] in name):
            with folder() as path:
                test(*[path] * test.__code__.co_argcount)
            print("ok", name, flush=True)
