"""Tones in captions: a tone counts only if the caption names exactly one."""

from dist_t2i.eval.skin_tones import group_of, split_tone, tone_of, tone_pair


def test_tone_pairs():
    assert tone_pair("man vampire medium-dark skin tone") == (
        "man vampire light skin tone",
        "man vampire dark skin tone",
    )
    assert tone_pair("woman light skin tone beard") == (
        "woman light skin tone beard",
        "woman dark skin tone beard",
    )
    for caption in ("root vegetable", "handshake light skin tone dark skin tone", "skin tone", "starlight skin tone"):
        assert tone_pair(caption) is None


def test_every_tone_is_taken_out_of_a_caption():
    assert split_tone("man vampire medium-dark skin tone") == ("man vampire ", "medium-dark", "")
    assert tone_of("woman light skin tone beard") == "light" and tone_of("starlight skin tone") == ""
    assert group_of("man cook medium skin tone") == group_of("man cook dark skin tone") != group_of("man cook")
