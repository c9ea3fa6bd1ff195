"""Hugging Face's tokenizer files and GGUF's: read as the tokenizers package reads them, or refused with a sentence."""

import json
import random

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from tf_gpt2.checkpoint import gguf, vocabulary
from tf_gpt2.checkpoint.download import embedded_dir
from tf_gpt2.errors import CheckpointError
from tf_gpt2.tokenizer.encoder import Encoder, SpecialToken
from tf_gpt2.tokenizer.refusing import RefusingEncoder

PLAIN = Encoder.from_files(embedded_dir())
ADDED = [
    AddedToken("<|endoftext|>", special=True, normalized=False),
    AddedToken("[PAD]", special=True, normalized=False),
    AddedToken("<|user|>", normalized=True),
    AddedToken("<mask>", lstrip=True, special=True, normalized=False),
    AddedToken(" right>", rstrip=True, normalized=True),
    AddedToken("\n", lstrip=True, rstrip=True, normalized=False),
    AddedToken("word", single_word=True, normalized=False),
]


def peer(pre_tokenizer=None, added=ADDED, **options):
    merges = [tuple(pair) for pair in sorted(PLAIN.bpe_ranks, key=PLAIN.bpe_ranks.get)]
    tokenizer = Tokenizer(models.BPE(vocab=PLAIN.encoder, merges=merges, **options))
    tokenizer.pre_tokenizer = pre_tokenizer or pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens(added)
    return tokenizer


def random_texts(n):
    rng = random.Random(7)
    # U+001C is white space for Python, and not for the tokenizers package
    parts = [
        *(token.content for token in ADDED),
        "\x1c",
        "\u3000",
        " ",
        "  ",
        "\n",
        "To be",
        "é",
        "🙂",
        "<|",
        "12",
        "'s",
        "words",
        "[PA",
    ]
    return ["".join(rng.choices(parts, k=rng.randrange(12))) for _ in range(n)]


def assert_equal_on_texts(encoder, tokenizer):
    for text in random_texts(500):
        ids = tokenizer.encode(text).ids
        assert encoder.encode(text, allowed_special="all") == ids, text
        assert encoder.decode(ids) == tokenizer.decode(ids, skip_special_tokens=False)


def test_tokenizer_json_is_read_as_the_package_reads_it(tmp_path):
    tokenizer = peer()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    encoder = vocabulary.read_huggingface_encoder(tmp_path)
    assert encoder.special_tokens["<mask>"] == SpecialToken(1026, lstrip=True)
    assert encoder.special_tokens["<|user|>"] == SpecialToken(1025, first=False, control=False)
    assert_equal_on_texts(encoder, tokenizer)
    assert encoder.encode("[PAD]") == PLAIN.encode("[PAD]")


def test_what_is_written_the_package_reads(tmp_path):
    special = {"<|endoftext|>": 1023, "[PAD]": 1024, "<|user|>": SpecialToken(1025, first=False, control=False)}
    encoder = Encoder(PLAIN.encoder, PLAIN.bpe_ranks, special_tokens=special)
    vocabulary.write_huggingface(encoder, tmp_path, 256)
    assert_equal_on_texts(encoder, Tokenizer.from_file(str(tmp_path / "tokenizer.json")))
    again = vocabulary.read_huggingface_encoder(tmp_path)
    assert (again.decoder, again.special_tokens, again.end_of_text) == (encoder.decoder, encoder.special_tokens, 1023)
    (tmp_path / "tokenizer.json").unlink()
    again = vocabulary.read_huggingface_encoder(tmp_path)
    assert (again.decoder, again.special_tokens, again.end_of_text) == (encoder.decoder, encoder.special_tokens, 1023)


def test_the_older_files_are_read(tmp_path):
    vocabulary.write_huggingface(PLAIN, tmp_path, 256)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).unlink()
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<|user|>": 1024}))
    pad = {"content": "[PAD]", "lstrip": True}
    content = {"eos_token": "<|user|>", "pad_token": pad, "unk_token": "<|endoftext|>"}
    (tmp_path / "special_tokens_map.json").write_text(json.dumps(content))
    merges = tmp_path / "merges.txt"
    merges.write_text(merges.read_text().partition("\n")[2])  # without the line #version
    encoder = vocabulary.read_huggingface_encoder(tmp_path)
    assert encoder.special_tokens.keys() == {"<|endoftext|>", "<|user|>", "[PAD]"}
    assert encoder.special_tokens["[PAD]"] == SpecialToken(1025, lstrip=True)  # no file numbers it: the next id
    assert encoder.end_of_text == 1024
    assert encoder.encode("To be") == PLAIN.encode("To be")
    assert vocabulary.read_huggingface_encoder(tmp_path, end_id=1023).end_of_text == 1023


def test_special_tokens_of_the_other_files_are_added_to_those_of_tokenizer_json(tmp_path):
    peer(added=ADDED[:1]).save(str(tmp_path / "tokenizer.json"))
    settings = {"eos_token": None, "pad_token": "[PAD]", "added_tokens_decoder": {"1024": {"content": "<|user|>"}}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<|bot|>": 1025}))
    encoder = vocabulary.read_huggingface_encoder(tmp_path)
    ids = {text: token.id for text, token in encoder.special_tokens.items()}
    assert ids == {"<|endoftext|>": 1023, "<|user|>": 1024, "<|bot|>": 1025, "[PAD]": 1026}


def test_names_that_stand_in_the_vocabulary_as_their_text(tmp_path):
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer, trained.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    names = ["<s>", "<|用户|>", "two words"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=270, special_tokens=names, initial_alphabet=alphabet, show_progress=False)
    trained.train_from_iterator(["To be or not to be"], trainer)
    trained.save(str(tmp_path / "tokenizer.json"))
    encoder = vocabulary.read_huggingface_encoder(tmp_path)
    text = "To be<|用户|> two words<s>"
    assert encoder.encode(text, allowed_special="all") == trained.encode(text).ids
    assert encoder.decode(trained.encode(text).ids) == text
    vocabulary.write_huggingface(encoder, tmp_path, 9)
    assert Tokenizer.from_file(str(tmp_path / "tokenizer.json")).encode(text).ids == trained.encode(text).ids


def test_what_is_written_has_the_same_ids_whatever_they_are(tmp_path):
    special = {"<|endoftext|>": 1023, "[PAD]": 1028, "<|用户|>": 1026}
    vocabulary.write_huggingface(Encoder(PLAIN.encoder, PLAIN.bpe_ranks, special_tokens=special), tmp_path, 9)
    found = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert {text: found.token_to_id(text) for text in special} == special
    twice = Encoder(PLAIN.encoder, PLAIN.bpe_ranks, special_tokens={"ab": 1024})
    with pytest.raises(ValueError, match="cannot express the special tokens ab"):
        vocabulary.write_huggingface(twice, tmp_path, 9)


def test_any_token_may_end_texts(tmp_path):
    peer().save(str(tmp_path / "tokenizer.json"))
    space = PLAIN.encode(" ")[0]
    assert vocabulary.read_huggingface_encoder(tmp_path, end_id=space).end_of_text == space


def with_first(tokenizer):
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 1023)]
    )
    return tokenizer


@pytest.mark.parametrize(
    ("tokenizer", "reason"),
    [
        (peer(pre_tokenizers.Whitespace()), "does not cut text as GPT-2 does"),
        (peer(pre_tokenizers.ByteLevel(add_prefix_space=True)), "does not cut text as GPT-2 does"),
        (peer(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)), "does not cut text as GPT-2 does"),
        (peer(dropout=0.1), "it has dropout"),
        (with_first(peer()), "it adds special tokens to each text"),
        (Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1}, unk_token="[UNK]")), "it is not byte-pair encoding"),
        (Tokenizer(models.Unigram([("a", 0.0)])), "it is not byte-pair encoding"),
    ],
    ids=["white space", "prefix space", "no cutting", "dropout", "template", "WordPiece", "Unigram"],
)
def test_other_tokenizers_are_refused_with_a_sentence(tmp_path, tokenizer, reason):
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    encoder = vocabulary.read_huggingface_encoder(tmp_path)
    assert isinstance(encoder, RefusingEncoder)
    with pytest.raises(CheckpointError, match=f"{reason}.* pass ids"):
        encoder.encode("a")


@pytest.mark.parametrize(("file", "reason"), [("vocab.txt", "vocab.txt is of another kind"), ("x", "is missing")])
def test_no_tokenizer_is_refused_with_a_sentence(tmp_path, file, reason):
    (tmp_path / file).write_text("[UNK]")
    with pytest.raises(CheckpointError, match=reason):
        vocabulary.read_huggingface_encoder(tmp_path).encode("a")


def test_damaged_files_are_refused(tmp_path):
    whole = json.loads(peer().to_str())
    for change in ({"added_tokens": [5]}, {"added_tokens": [{"content": "a", "id": "b"}]}, {"model": 5}, {"model": {}}):
        (tmp_path / "tokenizer.json").write_text(json.dumps({**whole, **change}))
        assert isinstance(vocabulary.read_huggingface_encoder(tmp_path), RefusingEncoder)
    for model in ({"vocab": [1]}, {"vocab": {"a": "b"}}, {"merges": [["a"]]}, {"merges": [5]}, {"merges": ["a b c"]}):
        (tmp_path / "tokenizer.json").write_text(json.dumps({**whole, "model": {**whole["model"], **model}}))
        assert isinstance(vocabulary.read_huggingface_encoder(tmp_path), RefusingEncoder)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        vocabulary.read_huggingface_encoder(tmp_path)


def entries_of(encoder, n_vocab):
    return {key: value for key, _, value in vocabulary.gguf_entries(encoder, n_vocab)}


def test_gguf_has_all_tokens():
    special = {"<|endoftext|>": 1023, "[PAD]": 1025, "a b": SpecialToken(1026, control=False)}
    encoder = Encoder(PLAIN.encoder, PLAIN.bpe_ranks, special_tokens=special)
    entries = entries_of(encoder, 1030)
    assert len(entries["tokenizer.ggml.tokens"]) == 1030
    assert entries["tokenizer.ggml.token_type"][1022:] == [1, 3, 5, 3, 4, 5, 5, 5]
    again = vocabulary.encoder_from_gguf(entries)
    assert (again.decoder, again.special_tokens, again.bpe_ranks) == (
        encoder.decoder,
        encoder.special_tokens,
        encoder.bpe_ranks,
    )
    assert again.end_of_text == 1023


def test_other_vocabularies_in_gguf_are_refused_with_a_sentence(tmp_path):
    from tf_gpt2.checkpoint.params import leaves, random_params
    from tf_gpt2.config import GPT2Config

    config = GPT2Config(n_vocab=1024, n_ctx=4, n_embd=2, n_head=1, n_layer=1)
    for change in (("tokenizer.ggml.model", gguf.STRING, "llama"), ("tokenizer.ggml.tokens", gguf.ARRAY, ["a"])):
        entries = [change if change[0] == key else (key, *rest) for key, *rest in vocabulary.gguf_entries(PLAIN, 1024)]
        gguf.write(tmp_path / "x.gguf", config, leaves(random_params(config)), "float32", entries)
        with pytest.raises(CheckpointError, match="no tokenizer that can be used here"):
            vocabulary.read_gguf_encoder(tmp_path / "x.gguf").encode("a")


def test_a_vocabulary_in_gguf_that_puts_tokens_around_texts_is_refused():
    with pytest.raises(ValueError, match="adds special tokens to each text"):
        vocabulary.encoder_from_gguf(entries_of(PLAIN, 1024) | {"tokenizer.ggml.add_bos_token": True})


def test_openai_s_files_cannot_have_every_special_token(tmp_path):
    vocabulary.check_openai(PLAIN)
    for special in ({"<|endoftext|>": 1023, "word": 1024}, {}, {"<|endoftext|>": SpecialToken(1023, lstrip=True)}):
        encoder = Encoder(PLAIN.encoder, PLAIN.bpe_ranks, special_tokens=special)
        if special.get("word"):
            vocabulary.write_openai(encoder, tmp_path)
            with pytest.raises(CheckpointError, match="no merge makes"):
                Encoder.from_files(tmp_path)
    with pytest.raises(ValueError, match="cannot express the special tokens"):
        vocabulary.check_openai(Encoder(PLAIN.encoder, PLAIN.bpe_ranks, special_tokens={}, end_of_text="</s>"))
