"""Labels by the bytes of tokens are those of the definition: a token belongs to a response that it covers a character of."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from alphatoken.pipeline.prepare.example import example_model
from alphatoken.pipeline.prepare.token_ends import TokenEnds
from alphatoken.pipeline.prepare.tokenize import ExampleMaker

WORDS = ["What is it? ", "four", "  two\n\n", "é", "日本", "🙂", "\t", "<|end|>", "e\u0301"]
TEXTS = st.lists(st.sampled_from(WORDS), min_size=1, max_size=12).map("".join)


def bytes_tokenizer(normalizer=None, prefix=False, **end):
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    inner.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=330, initial_alphabet=alphabet, show_progress=False)
    inner.train_from_iterator(["What is it? It is four, two and four."] * 9, trainer)
    if normalizer is not None:
        inner.normalizer = normalizer
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner)
    tokenizer.add_special_tokens({"additional_special_tokens": [AddedToken("<|end|>", special=True, **end)]})
    return tokenizer


def by_definition(tokenizer, ids, text, spans):
    """Every byte of the text has its token and its character; a token with a byte of a span's character is labelled."""
    value = {c: b for b, c in zip(sorted(range(256), key=order_of), alphabet_in_order(), strict=True)}
    owner, written = [], b""
    for number, token in enumerate(tokenizer.convert_ids_to_tokens(ids)):
        own = token.encode() if token == "<|end|>" else bytes(value[c] for c in token)
        owner += [number] * len(own)
        written += own
    assert written == text.encode()
    character = [i for i, c in enumerate(text) for _ in c.encode()]
    inside = {n for n, c in zip(owner, character, strict=True) if any(s <= c < e for s, e in spans)}
    return [token if number in inside else -100 for number, token in enumerate(ids)]


def shown(byte):
    return 33 <= byte <= 126 or 161 <= byte <= 172 or 174 <= byte <= 255


def order_of(byte):
    return (not shown(byte), byte)


def alphabet_in_order():
    """GPT-2's letters for bytes: those that can be shown stand for themselves, the others follow from 256 on."""
    return [chr(b) for b in range(256) if shown(b)] + [
        chr(256 + n) for n in range(sum(not shown(b) for b in range(256)))
    ]


@pytest.mark.parametrize("normalizer", [None, normalizers.NFC()], ids=["none", "nfc"])
@settings(max_examples=150, deadline=None)
@given(text=TEXTS, data=st.data())
def test_labels_are_those_of_the_definition(normalizer, text, data):
    tokenizer = bytes_tokenizer(normalizer)
    ends = TokenEnds.of(tokenizer)
    cuts = sorted(data.draw(st.sets(st.integers(0, len(text)), min_size=2, max_size=4))) if len(text) > 1 else [0, 1]
    spans = list(zip(cuts[::2], cuts[1::2], strict=False))
    (ids,) = ends.ids([text])
    found = ends.labels(ids, text, spans)
    assert ids == tokenizer(text, add_special_tokens=False)["input_ids"]
    if normalizer is not None and not text.isascii():
        assert found is None  # the normalizer may have changed how many bytes there are
    else:
        assert found == by_definition(tokenizer, ids, text, spans)


def test_tokenizers_that_change_the_text_are_asked_for_offsets():
    replaced = bytes_tokenizer()
    replaced.backend_tokenizer.decoder = decoders.Metaspace()
    lower = bytes_tokenizer(normalizers.Lowercase())

    class Own(PreTrainedTokenizerFast):
        def _encode_plus(self, *arguments, **options):
            return super()._encode_plus(*arguments, **options)

    own = Own(tokenizer_object=bytes_tokenizer().backend_tokenizer)
    assert [TokenEnds.of(one) for one in (replaced, lower, bytes_tokenizer(prefix=True), own)] == [None] * 4
    assert TokenEnds.of(bytes_tokenizer()) is not None


def test_a_token_that_takes_in_blanks_is_noticed():
    tokenizer = bytes_tokenizer(rstrip=True)
    ends = TokenEnds.of(tokenizer)
    for text, known in (("two<|end|>four", True), ("two<|end|>  four", False)):
        (ids,) = ends.ids([text])
        assert (ends.labels(ids, text, [(3, 10)]) is not None) is known
    assert ends.ids(["\ud800"]) is None  # refused by the tokenizer, which of several is found one by one


def test_examples_are_the_same_as_by_offsets():
    tokenizer = AutoTokenizer.from_pretrained(example_model(print))
    texts = ["Say é 日本 🙂 twice.", "  four\n\n", "It is\tfour, and 'two'.\r\n", "<|im_end|> is an end."]
    rows = [
        {"messages": [{"role": "user", "content": a}, {"role": "assistant", "content": b}]}
        for a in texts
        for b in texts
    ]
    rows += [{"prompt": a, "completion": b} for a in texts for b in texts]
    quick, slow = (ExampleMaker(tokenizer, 64, "auto", {}, len(tokenizer)) for _ in range(2))
    assert quick._ends is not None
    slow._ends = None
    drafts = [draft for row in rows for draft in quick.drafts(row, "a")]
    assert quick.finished(drafts) == slow.finished(drafts)
