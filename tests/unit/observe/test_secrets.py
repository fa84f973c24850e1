"""What must not reach config.yaml, and what must."""

import pytest

from moetrain.observe.secrets import MASK, mask_secrets

pytestmark = pytest.mark.unit

HEX40 = "0123456789abcdef0123456789abcdef01234567"


SECRET_KEYS = (
    "token hub_token HF_TOKEN apiToken api_key apikey WANDB_API_KEY password db_password client_secret "
    "aws_secret_access_key private_key credentials secrets"
)


@pytest.mark.parametrize("key", SECRET_KEYS.split())
def test_keys_that_name_a_secret(key):
    assert mask_secrets({"a": {key: "plain words"}}) == {"a": {key: MASK}}
    assert mask_secrets({key: ["one", {"user": "two", "port": 8}]}) == {key: [MASK, {"user": MASK, "port": 8}]}


@pytest.mark.parametrize(
    "config",
    [
        {
            "tokenizer": "byte",
            "tokens": 1000,
            "max_tokens": "12",
            "token": 7,
            "pad_token": "<pad>",
            "eos_token": "</s>",
        },
        {"api_key": None, "password": "", "keys": ["a"], "top_k": 2, "keyboard": "de"},
        {"data": {"revision": HEX40, "git_commit": HEX40}, "fingerprint": HEX40},
        {"path": "https://example.org/data@2/x.jsonl", "run": {"dir": "runs/hf_run"}, "note": "sk-1"},
        {"override": ["train.steps=3", "model.tokens=5", "data.tokenizer=gpt2"]},
    ],
)
def test_what_is_no_secret_stays(config):
    assert mask_secrets(config) == config


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ("hf_abcdefghijklmnopqrstuvwxyzABCDEFGH", MASK),
        (HEX40, MASK),
        (f"login with {HEX40} please", f"login with {MASK} please"),
        ("wandb_v1_abcdef0123456789", MASK),
        ("ghp_abcdefghij0123456789abcdefghij012345", MASK),
        ("AKIAIOSFODNN7EXAMPLE", MASK),
        ("https://me:pa55@host.example/data.jsonl", f"https://{MASK}@host.example/data.jsonl"),
        ("s3://key@bucket/x", f"s3://{MASK}@bucket/x"),
        ("https://host.example/x?token=abc&page=2", f"https://host.example/x?token={MASK}&page=2"),
        ("tracker.wandb.api_key=abc", f"tracker.wandb.api_key={MASK}"),
        ("Authorization: Bearer abc.def", f"Authorization: Bearer {MASK}"),
    ],
)
def test_values_that_look_like_secrets(text, masked):
    assert mask_secrets({"x": [text]}) == {"x": [masked]}


def test_the_original_is_not_changed():
    config = {"a": {"token": "x"}, "b": ["hf_0123456789abcdef"]}
    mask_secrets(config)
    assert config == {"a": {"token": "x"}, "b": ["hf_0123456789abcdef"]}
