import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from moetrain.data.tokenizer import check_vocabulary, load_tokenizer

pytestmark = pytest.mark.unit
TEXT = "aé€😀 b"


def _bpe(path, special, tmp_name="tokenizer.json"):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(["the cat sat on the mat " * 20], trainer)
    tokenizer.enable_truncation(4)  # which must not cut documents
    path.mkdir(exist_ok=True)
    tokenizer.save(str(path / tmp_name))
    return tokenizer


def test_bytes_round_trip_and_end_token():
    tokenizer = load_tokenizer("byte")
    (ids,) = tokenizer.encode([TEXT])
    assert ids.tolist() == list(TEXT.encode())
    assert tokenizer.decode([*ids, tokenizer.eos_id]) == TEXT
    assert (tokenizer.vocab_size, tokenizer.eos_id) == (257, 256)


def test_bytes_know_their_characters():
    ((ids, spans),) = load_tokenizer("byte").spans([TEXT])
    by_hand = [i for i, c in enumerate(TEXT) for _ in c.encode()]
    assert spans[:, 0].tolist() == by_hand
    assert len(ids) == len(spans)
    assert (spans[:, 1] - spans[:, 0] == 1).all()


def test_a_tokenizers_file(tmp_path):
    saved = _bpe(tmp_path, ["<unk>", "<|endoftext|>"])
    tokenizer = load_tokenizer(str(tmp_path / "tokenizer.json"))
    text = "the cat sat on the mat " * 3
    (ids,) = tokenizer.encode([text])
    assert len(ids) > 4
    assert tokenizer.decode(ids) == "the cat sat on the mat " * 3 or saved.decode(ids.tolist()) == tokenizer.decode(ids)
    assert tokenizer.eos_id == saved.token_to_id("<|endoftext|>")
    ((same, spans),) = tokenizer.spans([text])
    assert np.array_equal(same, ids)
    assert spans[0].tolist() == [0, 3]  # "the"
    assert tokenizer.fingerprint == load_tokenizer(str(tmp_path)).fingerprint
    assert tokenizer.fingerprint != load_tokenizer(str(tmp_path), eos_token="<unk>").fingerprint


def test_a_transformers_directory_names_its_own_end_token(tmp_path):
    backend = _bpe(tmp_path / "raw", ["<end>", "</s>"])
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>").save_pretrained(tmp_path / "saved")
    tokenizer = load_tokenizer(str(tmp_path / "saved"))
    assert tokenizer.eos_id == backend.token_to_id("<end>")
    assert len(tokenizer.encode(["the cat sat on the mat " * 3])[0]) > 4


def test_no_end_token_lists_what_could_be_one(tmp_path):
    _bpe(tmp_path, ["<stop>"])
    with pytest.raises(ValueError, match=r"data\.eos_token.*<stop>"):
        load_tokenizer(str(tmp_path))
    assert load_tokenizer(str(tmp_path), eos_token="<stop>").eos_id == 0
    with pytest.raises(ValueError, match="'<sotp>' is not one of its tokens"):
        load_tokenizer(str(tmp_path), eos_token="<sotp>")


def test_an_unknown_tokenizer_is_named(tmp_path):
    (tmp_path / "broken.json").write_text("{}")
    for name in (str(tmp_path / "nowhere"), str(tmp_path / "broken.json")):
        with pytest.raises(ValueError, match=r"data\.tokenizer='.*(nowhere|broken)"):
            load_tokenizer(name)


def test_the_model_must_have_a_row_for_every_id():
    check_vocabulary(load_tokenizer("byte"), 257)
    with pytest.raises(ValueError, match=r"model\.vocab_size=256 .*257 ids.*model\.vocab_size=264"):
        check_vocabulary(load_tokenizer("byte"), 256)
