"""COCO, CUB and Oxford-102 flowers: small trees of exactly the layout in which they are distributed."""

import json
import pickle

import pytest

from dist_t2i.data.shard_set import open_set
from pictures import encoded, picture
from shard_tool import captions_by_key, problems, reasons, shard


def jpeg(path, number):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encoded(picture(number), "JPEG"))


def coco_tree(root, year=2014, train=6, val=3):
    """Pictures and captions; returns the names by part."""
    names = {}
    for part, numbers in ((f"train{year}", range(train)), (f"val{year}", range(train, train + val))):
        prefix = f"COCO_{part}_" if year == 2014 else ""
        names[part] = [f"{prefix}{9 + 7 * number:012d}.jpg" for number in numbers]
        for number, name in zip(numbers, names[part], strict=True):
            jpeg(root / part / name, number)
        images = [
            {"id": 9 + 7 * number, "file_name": name, "height": 40, "width": 40, "license": 3, "coco_url": "http://x"}
            for number, name in zip(numbers, names[part], strict=True)
        ]
        annotations = [
            {"image_id": 9 + 7 * number, "id": 10 * number + way, "caption": f"A thing {number} in way {way}.\n"}
            for number in numbers
            for way in range(5)
        ]
        path = root / "annotations" / f"captions_{part}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps({"info": {}, "licenses": [], "images": images, "annotations": annotations}))
    return names


@pytest.mark.parametrize("year", [2014, 2017])
def test_coco(tmp_path, year):
    names = coco_tree(tmp_path / "coco", year)
    shard("coco", tmp_path / "coco", "--out", tmp_path / "set")
    data_set = open_set(tmp_path / "set")
    assert data_set.splits == ("train", "test") and data_set.manifest["name"] == f"MS-COCO {year}"
    for split, part in (("train", f"train{year}"), ("test", f"val{year}")):
        assert {sample.key + ".jpg" for sample in data_set.samples(split)} == set(names[part])
    sample = next(one for one in data_set.samples("train") if one.attributes["image_id"] == 16)
    assert sample.captions == tuple(f"A thing 1 in way {way}." for way in range(5))
    assert sample.image_bytes == encoded(picture(1), "JPEG")
    assert "CC BY 4.0" in (tmp_path / "set" / "README.md").read_text()


def test_coco_with_karpathys_split(tmp_path):
    names = coco_tree(tmp_path / "coco")
    splits = dict(zip(names["train2014"], ["train"] * 6, strict=True))
    splits |= dict(zip(names["val2014"], ["restval", "val", "test"], strict=True))
    images = [
        {
            "filepath": name.split("_")[1],
            "filename": name,
            "split": split,
            "cocoid": int(name[-16:-4]),
            "imgid": number,
            "sentids": [number],
            "sentences": [{"tokens": ["a"], "raw": f"Said of {name}", "imgid": number, "sentid": number}],
        }
        for number, (name, split) in enumerate(splits.items())
    ]
    images.append(images[0] | {"filename": "COCO_train2014_000000999999.jpg"})
    images.append(images[0] | {"filepath": "../coco/train2014"})
    (tmp_path / "dataset_coco.json").write_text(json.dumps({"images": images, "dataset": "coco"}))
    shard("coco", tmp_path / "coco", "--karpathy", tmp_path / "dataset_coco.json", "--out", tmp_path / "set")
    data_set = open_set(tmp_path / "set")
    found = {sample.key + ".jpg": split for split in data_set.splits for sample in data_set.samples(split)}
    assert found == {name: {"restval": "train"}.get(split, split) for name, split in splits.items()}
    assert ("train2014/COCO_train2014_000000999999.jpg", "picture is missing") in reasons(tmp_path / "set")


def test_what_is_wrong_in_coco_is_listed(tmp_path):
    coco_tree(tmp_path / "coco")
    path = tmp_path / "coco" / "annotations" / "captions_train2014.json"
    content = json.loads(path.read_text())
    content["annotations"] = [one for one in content["annotations"] if one["image_id"] != 9]
    content["annotations"].append({"image_id": 5, "id": 99, "caption": "of nothing"})
    path.write_text(json.dumps(content))
    (tmp_path / "coco" / "train2014" / "COCO_train2014_000000000016.jpg").unlink()
    jpeg(tmp_path / "coco" / "train2014" / "COCO_train2014_000000000777.jpg", 1)
    shard("coco", tmp_path / "coco", "--out", tmp_path / "set")
    assert problems(tmp_path / "set") == {
        ("captions_train2014.json: 99", "5", "caption of an unknown picture"),
        ("captions_train2014.json: 9", "COCO_train2014_000000000009", "picture is left without a caption"),
        ("captions_train2014.json: 16", "train2014/COCO_train2014_000000000016.jpg", "picture is missing"),
        ("", "train2014/COCO_train2014_000000000777.jpg", "picture is not in captions_train2014.json"),
    }


def test_a_coco_that_is_laid_out_otherwise_is_reported(tmp_path):
    def error(*more):
        done = shard("coco", tmp_path / "coco", *more, "--out", tmp_path / "set", check=False)
        assert done.returncode == 2 and "Traceback" not in done.stderr
        return done.stderr

    assert "this folder does not exist" in error() and "annotations/captions_train2014.json" in error()
    (tmp_path / "coco").mkdir()
    assert "has no folder train2014 or train2017" in error()
    coco_tree(tmp_path / "coco")
    path = tmp_path / "coco" / "annotations" / "captions_val2014.json"
    whole = path.read_bytes()
    path.write_bytes(whole[:100])
    assert "is not JSON" in error() and "captions_val2014.json" in error()
    path.write_text("{}")
    assert 'has no list "images"' in error()
    path.unlink()
    assert "captions_val2014.json is missing" in error()
    coco_tree(tmp_path / "coco", 2017)
    assert "select one with --year" in error()
    assert "cannot read" in error("--karpathy", tmp_path) or "is missing" in error("--karpathy", tmp_path)


def class_tree(texts, images, classes, per_class=2):
    """TEXTS/CLASS/NAME.txt with ten captions for each of `images(class, number)`."""
    count = 0
    for name in classes:
        for _ in range(per_class):
            count += 1
            path = images(name, count)
            jpeg(path, count)
            file = texts / name / f"{path.stem}.txt"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text("".join(f"picture {count} said in way {way} .\n" for way in range(10)))


CUB = ["001.Black_footed_Albatross", "002.Laysan_Albatross", "003.Sooty_Albatross", "004.Groove_billed_Ani"]


def cub_tree(root, texts="text_c10"):
    class_tree(
        root / texts,
        lambda name, number: root / "CUB_200_2011" / "images" / name / f"{name[4:]}_{number:04d}_{number + 700}.jpg",
        CUB,
    )


def classes_of(folder):
    data_set = open_set(folder)
    return {split: {sample.attributes["class"] for sample in data_set.samples(split)} for split in data_set.splits}


@pytest.mark.parametrize("texts", ["text_c10", "cvpr2016_cub/text_c10"])
def test_cub_with_the_lists_of_the_text_release(tmp_path, texts):
    cub_tree(tmp_path / "cub", texts)
    lists = (tmp_path / "cub" / texts).parent
    (lists / "trainvalclasses.txt").write_text("\n".join([CUB[0], CUB[2], CUB[3]]))
    (lists / "trainclasses.txt").write_text(CUB[0])
    (lists / "testclasses.txt").write_text(CUB[1] + "\n")
    done = shard("cub", tmp_path / "cub", "--out", tmp_path / "set")
    assert "trainvalclasses.txt and" in done.stderr
    assert classes_of(tmp_path / "set") == {"train": {CUB[0], CUB[2], CUB[3]}, "test": {CUB[1]}}
    found = captions_by_key(tmp_path / "set")
    key = "001_Black_footed_Albatross/Black_footed_Albatross_0001_701"
    assert len(found) == 8 and found[key] == tuple(f"picture 1 said in way {way} ." for way in range(10))


def test_cub_without_lists_holds_out_every_fourth_class(tmp_path):
    cub_tree(tmp_path / "cub")
    done = shard("cub", tmp_path / "cub", "--out", tmp_path / "set")
    assert "the default rule" in done.stderr
    assert classes_of(tmp_path / "set") == {"train": set(CUB[:3]), "test": {CUB[3]}}


def test_lists_of_classes_that_do_not_fit_are_reported(tmp_path):
    cub_tree(tmp_path / "cub")

    def error(*arguments):
        done = shard("cub", tmp_path / "cub", "--out", tmp_path / "set", *arguments, check=False)
        assert done.returncode == 2 and "Traceback" not in done.stderr
        return done.stderr

    (tmp_path / "typo.txt").write_text("001.Black_foted_Albatross")
    assert "did you mean 001.Black_footed_Albatross?" in error("--test-classes", tmp_path / "typo.txt")
    (tmp_path / "one.txt").write_text("\n".join(CUB[:2]))
    (tmp_path / "two.txt").write_text("\n".join(CUB[1:3]))
    both = error("--train-classes", tmp_path / "one.txt", "--test-classes", tmp_path / "two.txt")
    assert f"both name {CUB[1]}" in both
    (tmp_path / "two.txt").write_text(CUB[2])
    neither = error("--train-classes", tmp_path / "one.txt", "--test-classes", tmp_path / "two.txt")
    assert f"names {CUB[3]} (1 classes)" in neither
    (tmp_path / "filenames.pickle").write_bytes(pickle.dumps(CUB))
    assert "pickles are not read" in error("--train-classes", tmp_path / "filenames.pickle")
    assert "cannot read the list" in error("--train-classes", tmp_path / "none.txt")


def test_what_is_wrong_in_cub_is_listed(tmp_path):
    cub_tree(tmp_path / "cub")
    images, texts = tmp_path / "cub" / "CUB_200_2011" / "images" / CUB[0], tmp_path / "cub" / "text_c10"
    (images / "Black_footed_Albatross_0001_701.jpg").unlink()
    (texts / CUB[0] / "Black_footed_Albatross_0002_702.txt").write_text("\n \n")
    jpeg(tmp_path / "cub" / "CUB_200_2011" / "images" / "005.Crested_Auklet" / "a.jpg", 1)
    shard("cub", tmp_path / "cub", "--out", tmp_path / "set")
    key = "001_Black_footed_Albatross/Black_footed_Albatross_0002_702"
    assert reasons(tmp_path / "set") == {
        ("Black_footed_Albatross_0001_701.jpg", "picture is missing"),
        (key, "caption is empty"),
        (key, "picture is left without a caption"),
        ("text_c10/005.Crested_Auklet", "class has no captions"),
    }


def flower_tree(root):
    classes = [f"class_{number:05d}" for number in range(1, 7)]
    class_tree(root / "text_c10", lambda name, number: root / "jpg" / f"image_{number:05d}.jpg", classes)
    return classes


def test_flowers(tmp_path):
    classes = flower_tree(tmp_path / "flowers")
    shard("flowers", tmp_path / "flowers", "--out", tmp_path / "default")
    assert classes_of(tmp_path / "default") == {"train": {*classes} - {classes[4]}, "test": {classes[4]}}
    (tmp_path / "flowers" / "testclasses.txt").write_text("class_00002\r\nclass_00003\r\n")
    (tmp_path / "flowers" / "trainclasses.txt").write_text("class_00001\r\nclass_00004\r\n")
    (tmp_path / "flowers" / "valclasses.txt").write_text("class_00005\r\nclass_00006\r\n")
    shard("flowers", tmp_path / "flowers", "--out", tmp_path / "listed")
    assert classes_of(tmp_path / "listed") == {"train": {classes[0], *classes[3:]}, "test": {classes[1], classes[2]}}
    assert "class_00001/image_00002" in captions_by_key(tmp_path / "listed", "train")


@pytest.mark.parametrize(
    ("source", "missing", "says"),
    [
        ("cub", "CUB_200_2011", "has no folder CUB_200_2011/images or images"),
        ("cub", "text_c10", "has no folder text_c10"),
        ("flowers", "jpg", "has no folder jpg"),
        ("flowers", "text_c10", "text_c10/class_00001/image_06734.txt"),
    ],
)
def test_a_folder_that_is_missing_is_reported_with_the_layout(tmp_path, source, missing, says):
    (cub_tree if source == "cub" else flower_tree)(tmp_path / "data")
    (tmp_path / "data" / missing).rename(tmp_path / "elsewhere")
    done = shard(source, tmp_path / "data", "--out", tmp_path / "set", check=False)
    assert done.returncode == 2 and says in done.stderr and "Expected files" in done.stderr
    layout = shard(source, "--help").stdout
    assert "text_c10" in layout and "testclasses.txt" in layout
