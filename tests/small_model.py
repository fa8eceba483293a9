"""A small Qwen2 folder with an R1-style tokenizer, made on the spot: what stands in for R1-Distill-Qwen in the tests.

python tests/small_model.py FOLDER          # writes the model and a file of questions beside it
"""

import json
import sys
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast, Qwen2Config

BOS, EOS = "<\uff5cbegin\u2581of\u2581sentence\uff5c>", "<\uff5cend\u2581of\u2581sentence\uff5c>"
USER, ASSISTANT = "<\uff5cUser\uff5c>", "<\uff5cAssistant\uff5c>"
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}" + USER + "{{ m['content'] }}"
    "{% else %}" + ASSISTANT + "{{ m['content'] }}" + EOS + "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}" + ASSISTANT + "<think>\n{% endif %}"
)


def questions(n: int = 40) -> list[dict]:
    """Return word problems with their answers, in the layout of the data files."""
    rows = []
    for i in range(n):
        a, b, c = 3 + i % 9, 2 + i % 5, 1 + i % 7
        text = f"Ann has {a} boxes with {b} apples each. She eats {c}. How many apples are left?"
        rows.append({"problem": text, "answer": str(a * b - c), "level": 1 + i % 3})
    return rows


CORPUS = [row["problem"] for row in questions()] + ["The answer is \\boxed{12}. Let me think."]


def make_tokenizer(
    corpus: list[str], special=(BOS, EOS), ordinary=(USER, ASSISTANT, "<think>", "</think>"), template=TEMPLATE
) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer, by default with R1's control tokens: thinking marks are ordinary tokens.

    The first two special tokens begin and end.
    """
    pieces = Tokenizer(models.BPE())
    pieces.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    pieces.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    pieces.train_from_iterator(corpus, trainer)
    pieces.add_special_tokens(list(special))
    pieces.add_tokens([AddedToken(t, normalized=False) for t in ordinary])
    bos, eos = special[:2]
    return PreTrainedTokenizerFast(
        tokenizer_object=pieces, bos_token=bos, eos_token=eos, pad_token=eos, chat_template=template
    )


def make_folder(folder: Path, seed: int = 0) -> Path:
    """Write the model to `folder` and questions.jsonl beside it; return the path of the questions."""
    data, rows = folder.parent / "questions.jsonl", questions()
    folder.mkdir(parents=True, exist_ok=True)
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_model(folder, make_tokenizer(CORPUS), Qwen2Config, seed)
    return data


def write_model(folder: Path, tokenizer, kind: type, seed: int = 0, **more) -> None:
    """Write a random model with a tokenizer; `more` for its config."""
    torch.manual_seed(seed)
    config = kind(
        hidden_size=64, intermediate_size=160, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=2048, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id, **{"vocab_size": len(tokenizer), **more},
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


CHATML = (  # SmolLM2's and Qwen2.5's, with a system text that is always there
    "{% for m in messages %}{% if loop.first and m['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou help.<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def plain_folder(folder: Path, family: str) -> Path:
    """Write a small model that knows no thinking: ChatML, no control token. "llama": tied embeddings, no row to spare.
    "qwen": two embeddings, rows to spare, and three of Qwen2's reserved tokens."""
    slots = ("<|quad_start|>", "<|quad_end|>", "<|box_start|>") if family == "qwen" else ()
    tokenizer = make_tokenizer(CORPUS, ("<|im_start|>", "<|im_end|>", *slots), (), CHATML)
    kind, rows = (Qwen2Config, 5) if family == "qwen" else (LlamaConfig, 0)
    write_model(folder, tokenizer, kind, vocab_size=len(tokenizer) + rows, tie_word_embeddings=not rows)
    return folder


QWEN = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|quad_start|>", "<|quad_end|>")


def qwen_folder(folder: Path) -> Path:
    """A small model folder with tokenizer files in Qwen2's layout: slots are special tokens, listed in both files."""
    make_folder(folder)
    pieces = json.loads((folder / "tokenizer.json").read_text())
    start = max(t["id"] for t in pieces["added_tokens"]) + 1
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    pieces["added_tokens"] += [{"id": start + i, "content": text, **flags} for i, text in enumerate(QWEN)]
    (folder / "tokenizer.json").write_text(json.dumps(pieces))
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["added_tokens_decoder"] = {
        str(t["id"]): {k: v for k, v in t.items() if k != "id"} for t in pieces["added_tokens"]
    }
    config["additional_special_tokens"] = list(QWEN[1:])
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    model_config = AutoConfig.from_pretrained(folder)
    model_config.vocab_size = start + len(QWEN) + 5  # padded, as vocabularies are
    AutoModelForCausalLM.from_config(model_config).save_pretrained(folder)
    return folder


if __name__ == "__main__":
    print(make_folder(Path(sys.argv[1])))
