"""The statistics of captions in a manifest."""

from collections import Counter

from dist_t2i.data.manifest import caption_statistics
from dist_t2i.data.tokenizer import train_tokenizer


def test_repeated_captions_count_as_often_as_they_occur():
    captions = [["a cat", "a cat and a dog"], ["a cat"], ["the bright leftovers"]]
    tokenizer = train_tokenizer(Counter(["a cat", "a dog"]), 300)
    found = caption_statistics(captions, tokenizer)
    assert (found["count"], found["distinct"], found["per_picture"]) == (4, 3, {"mean": 1.333, "max": 2})
    assert found["words"] == {"mean": 3.0, "max": 5}
    assert found["frequent_words"][:3] == ["a", "cat", "and"] and found["words_not_in_train"] == 4
    assert found["left_or_right"] == 0
    assert caption_statistics([], tokenizer)["count"] == 0


def test_captions_that_say_left_or_right_are_counted():
    said = ["the Left one", "left-hand traffic", "the rightmost cup", "from right to left", "a left-facing man"]
    others = ["a bright day", "what is leftover", "all rights"]
    tokenizer = train_tokenizer(Counter(said), 300)
    assert caption_statistics([said, said[:1], others], tokenizer)["left_or_right"] == 6
