"""Control tokens: `<think>`, `</think>`, `<short>` in a vocabulary that lacks them.

    tokenizer = take(tokenizer, {"<think>": "add", "<short>": "<|quad_start|>"})

A new token takes a new row ("add"), or a reserved one is renamed, in tokenizer.json and in the `added_tokens_decoder`
of tokenizer_config.json alike. It is an ordinary token either way: a special one is dropped by
`skip_special_tokens=True`, and the mode with it. Its row starts as the mean of those of words that say what it does
(`words`); what a reserved row holds was never trained.
"""

import json
import re
import tempfile
from pathlib import Path

from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast

from adaptive_reasoning.errors import UserError
from adaptive_reasoning.tasks import prompts

MODEL, RESERVED, ADD = "model", "reserved", "add"  # what --control_tokens takes beside a mapping
WORDS = {"<think>": "think", "</think>": "end of thinking", "<short>": "short"}
# Tokens that text models have and do not use: Qwen2's grounding marks, then reserved slots by any name.
KNOWN = ("quad_start", "quad_end", "box_start", "box_end", "object_ref_start", "object_ref_end")
SLOT = re.compile(r"reserved|unused|extra_id|dummy|placeholder", re.IGNORECASE)


def wanted(option: str, needed: tuple[str, ...]) -> dict[str, str]:
    """Return {control token: slot, "reserved" or "add"} of --control_tokens.

    Args:
        needed: tokens of the response format.

    Raises:
        UserError: neither one of the three words nor such a mapping.
    """
    if option in (MODEL, RESERVED, ADD):
        return {} if option == MODEL else dict.fromkeys(needed, option)
    pairs = [part.partition("=")[::2] for part in option.split(",")]
    if not all(new and slot for new, slot in pairs) or len(dict(pairs)) < len(pairs):
        raise UserError(
            f"--control_tokens {option!r}: takes model, reserved, add, or pairs TOKEN=SLOT such as "
            "'<think>=add,</think>=add,<short>=<|quad_start|>', each token once."
        )
    return dict(pairs)


def take(tokenizer, how: dict[str, str]) -> PreTrainedTokenizerFast:
    """Return the tokenizer with control tokens added, or reserved tokens renamed to them.

    One that the tokenizer holds already stays, so a warm-up can be started from a warmed-up model.

    Args:
        how: as from `wanted`.

    Raises:
        UserError: no fitting slot, a slot that is in use, or a text that cannot be a token.
    """
    for new, slot in how.items():
        if is_token(tokenizer, new):
            continue
        if not new or new != new.strip():
            raise UserError(f"{new!r} cannot be the name of a control token.")
        if slot == ADD:
            tokenizer.add_tokens([AddedToken(new, normalized=False, special=False)])
        else:
            tokenizer = rename_token(tokenizer, find_slot(tokenizer) if slot == RESERVED else slot, new)
        prompts.control_token(tokenizer, new)
    return tokenizer


def is_token(tokenizer, text: str) -> bool:
    """Return whether the tokenizer holds a text as one token."""
    try:
        return bool(text) and prompts.control_token(tokenizer, text) >= 0
    except UserError:
        return False


def words(tokenizer, token: str) -> list[int]:
    """Return the tokens of the words that a control token's row starts from.

    "think", "end of thinking" and "short"; of another tag its name, `</COT>` as "end of cot".
    """
    name = re.sub(r"[\W_]+", " ", token).strip().lower()
    text = WORDS.get(token) or (f"end of {name}" if token.startswith("</") else name) or token
    # As inside a sentence: with the space in front where that is a part of the words' own tokens.
    return min((tokenizer.encode(t, add_special_tokens=False) for t in (f" {text}", text)), key=len)


def added_tokens(tokenizer) -> dict[str, int]:
    """Return {text: id} of the tokens beside the trained vocabulary."""
    return {token.content: i for i, token in tokenizer.added_tokens_decoder.items()}


def named_uses(tokenizer) -> dict[str, str]:
    """Return {token: what it is for} of the tokens with a part to play: bos, eos, ..."""
    return {text: name for name, text in tokenizer.special_tokens_map.items() if isinstance(text, str)}


def find_slot(tokenizer) -> str:
    """Return a reserved token that nothing uses.

    Raises:
        UserError: there is none; the message lists the added tokens to choose from.
    """
    template, used = str(tokenizer.chat_template or ""), named_uses(tokenizer)
    free = [text for text in added_tokens(tokenizer) if text not in used and text not in template]
    known = [f"<|{name}|>" for name in KNOWN if f"<|{name}|>" in free]
    found = known + [text for text in free if SLOT.search(text)]
    if not found:
        raise UserError(
            f"the tokenizer of {tokenizer.name_or_path!r} has no reserved token that could be renamed (looked for "
            "Qwen2's <|quad_start|> and the like, and for names with 'reserved' or 'unused'). --control_tokens add "
            "gives every token a new row, and --control_tokens '<short>=...' takes an added token that the model never "
            f"used: {', '.join(free) or 'none is free'}."
        )
    return found[0]


def rename_token(tokenizer, old: str, new: str) -> PreTrainedTokenizerFast:
    """Return the tokenizer with the added token `old` called `new`: same id, ordinary instead of special.

    Raises:
        UserError: `old` is not an added token or has a part to play, or `new` exists already.
    """
    known = added_tokens(tokenizer)
    if old not in known:
        raise UserError(
            f"the tokenizer of {tokenizer.name_or_path!r} has no added token {old!r} to rename to {new!r}. It has: "
            f"{', '.join(known) or 'none'}."
        )
    if new in tokenizer.get_vocab():
        raise UserError(
            f"the tokenizer of {tokenizer.name_or_path!r} holds {new!r} already: there is nothing to rename."
        )
    role = named_uses(tokenizer).get(old) or ("chat_template" if old in str(tokenizer.chat_template or "") else None)
    if role:
        raise UserError(f"{old!r} is in use as {role}: rename a token that is not.")
    size, name = len(tokenizer), tokenizer.name_or_path
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        rename_in_folder(Path(folder), old, new)
        renamed = PreTrainedTokenizerFast.from_pretrained(folder)
    renamed.name_or_path = name
    assert len(renamed) == size and prompts.control_token(renamed, new) == known[old] and old not in renamed.get_vocab()
    return renamed


def rename_in_folder(folder: Path, old: str, new: str) -> None:
    """Rename an added token in the files of a tokenizer folder, in place."""
    rewrite(folder / "tokenizer.json", lambda content: rename_in_pieces(content, old, new))
    for name in ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"):
        if (folder / name).is_file():
            rewrite(folder / name, lambda content: rename_in_config(content, old, new))


def rewrite(path: Path, change) -> None:
    content = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(change(content), ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


def rename_in_pieces(content: dict, old: str, new: str) -> dict:
    """tokenizer.json: the entry of `added_tokens`, and the vocabulary where it lists added tokens too."""
    for entry in content["added_tokens"]:
        if entry["content"] == old:
            entry |= {"content": new, "special": False, "normalized": False}
    vocab = content["model"].get("vocab")
    if isinstance(vocab, dict) and old in vocab:
        content["model"]["vocab"] = {new if text == old else text: i for text, i in vocab.items()}
    return content


def rename_in_config(content: dict, old: str, new: str) -> dict:
    """tokenizer_config.json and its companions: the entry by id, the list of special tokens, the map by text."""
    for entry in content.get("added_tokens_decoder", {}).values():
        if entry.get("content") == old:
            entry |= {"content": new, "special": False, "normalized": False}
    for key, value in content.items():
        if isinstance(value, list):  # additional_special_tokens: left there, it would come back as one more token
            content[key] = [text for text in value if (text.get("content") if isinstance(text, dict) else text) != old]
    return {new if key == old else key: value for key, value in content.items()}
