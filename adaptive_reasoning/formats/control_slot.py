"""Control slot: a new control token without a new row in the vocabulary, by renaming one that no model ever used.

    tokenizer = take_slot(tokenizer, "<short>", slot="<|quad_start|>")

Thinkless needs `<short>` as one token. Adding a token would grow the embeddings; instead a reserved one is renamed, in
tokenizer.json and in the `added_tokens_decoder` of tokenizer_config.json alike. It becomes an ordinary token: a special
one is dropped by `skip_special_tokens=True`, and the mode with it.
"""

import json
import re
import tempfile
from pathlib import Path

from transformers import PreTrainedTokenizerFast

from adaptive_reasoning.errors import UserError
from adaptive_reasoning.tasks import prompts

AUTO = "auto"  # find a slot
# Tokens that text models have and do not use: Qwen2's grounding marks, then reserved slots by any name.
KNOWN = ("quad_start", "quad_end", "box_start", "box_end", "object_ref_start", "object_ref_end")
RESERVED = re.compile(r"reserved|unused|extra_id|dummy|placeholder", re.IGNORECASE)


def take_slot(tokenizer, new: str, slot: str = AUTO) -> PreTrainedTokenizerFast:
    """Return the tokenizer with a reserved token renamed to `new`.

    A tokenizer that holds `new` already is returned as it is, so a warm-up can be started from a warmed-up model.

    Raises:
        UserError: no fitting slot, or a slot that is in use.
    """
    if new not in added_tokens(tokenizer):
        tokenizer = rename_token(tokenizer, find_slot(tokenizer) if slot == AUTO else slot, new)
    prompts.control_token(tokenizer, new)
    return tokenizer


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
    found = known + [text for text in free if RESERVED.search(text)]
    if not found:
        raise UserError(
            f"the tokenizer of {tokenizer.name_or_path!r} has no reserved token that could be renamed (looked for "
            f"Qwen2's <|quad_start|> and the like, and for names with 'reserved' or 'unused'). Name one of its added "
            f"tokens that the model never used: {', '.join(free) or 'none is free'}."
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
    if not new or new != new.strip():
        raise UserError(f"{new!r} cannot be the name of a control token.")
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


BLOCK = re.compile(r"<think>(?:(?:\\n|\n)*</think>(?:\\n|\n)*|(?:\\n|\n)?)")  # an empty block, or one opened
CUT = re.compile(  # R1's template drops the thinking of finished answers
    r"\{%-?\s*if '</think>' in content\s*-?%\}\s*\{%-?\s*set content = content\.split\('</think>'\)\[-1\]\s*-?%\}\s*"
    r"\{%-?\s*endif\s*-?%\}"
)


def thinkless_template(tokenizer) -> str:
    """Return the tokenizer's chat template with Thinkless' two edits: no `<think>` prefilled, no thinking cut away.

    Raises:
        UserError: the edits do not lead to a prompt that ends at the assistant's mark, or answers are still cut.
    """
    edited = CUT.sub("", BLOCK.sub("", str(tokenizer.chat_template or "")))
    old, tokenizer.chat_template = tokenizer.chat_template, edited
    try:
        prompts.check_ends_at_assistant(tokenizer)
        answer = "<think>\na\n</think>\nb"
        messages = [{"role": "user", "content": "1+1"}, {"role": "assistant", "content": answer}]
        if answer not in prompts.chat_text(tokenizer, messages):
            raise UserError("Finished answers are changed (thinking is cut away).")
    except UserError as error:
        if not old:
            raise
        raise UserError(
            f"--chat_template thinkless cannot edit the chat template of {tokenizer.name_or_path!r}: without its "
            "<think> it still does not fit. Take --chat_template arm, which replaces it by a plain one, or write your "
            f"own. What is wrong with the edited one: {error}"
        ) from error
    finally:
        tokenizer.chat_template = old
    return edited


def template_mend(tokenizer) -> str:
    """Return what gives a tokenizer a chat template that ends at the assistant's mark."""
    try:
        thinkless_template(tokenizer)
    except UserError:
        return " A supervised start with --chat_template arm replaces it by a plain one that fits."
    return " A supervised start with --chat_template thinkless, or arm, does it."


def check_rows(model, token: int, text: str) -> None:
    """Raise UserError unless the embeddings have a row for the token.

    Vocabularies are often padded to a round number, so a token may lie beyond the tokenizer's own size; it must not lie
    beyond the model's.
    """
    if token >= (rows := model.config.vocab_size):
        raise UserError(
            f"{text!r} would be token {token}, but the model's embeddings have {rows} rows: take another slot."
        )
