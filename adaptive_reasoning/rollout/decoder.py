"""The decoder of the rollout loop: Qwen2, Qwen3 and Llama over static buffers.

Forward passes share one set of weights and differ in what attention sees:
  prefill        fresh prompts [B, n], causal over themselves; `prefill_packed` the same without padding, by flash-attn
  extend         more tokens [B, n] for rows that already have keys and values (next turn of a dialogue)
  decode         one token per live row [n] over contiguous rows of the cache, in the fewest calls to torch: for the CPU
  decode_paged   the same over pages, out of the kernels of `kernels/`: for CUDA
The last two are functions of static tensors alone, so that a CUDA graph can capture them as they are.

The weights are a replica of their own, refreshed in place: q, k, v and gate, up are merged into one matrix each,
matrices are stored the way round that is faster for few rows, and the columns of q and k are interleaved so that the
rotary embedding is one complex product (x1 + i x2) exp(i m theta) instead of rotate-half; q.k is the same number in
either order.

Legend: L layers, S cache rows, T cache columns, B rows of a call, n tokens a row, H hidden, h query heads, k key/value
heads, D head size, I intermediate size, V vocabulary.
"""

import functools
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from adaptive_reasoning import kernels
from adaptive_reasoning.errors import UserError
from adaptive_reasoning.kernels.rms_norm import rms_norm  # the torch twin; `decode_paged` asks the dispatcher

FAMILIES = ("qwen2", "qwen3", "llama")


@dataclass
class Layer:
    """Merged weights of one decoder layer; biases and head norms are None where the family has none."""

    attn_norm: torch.Tensor  # [H]
    qkv: torch.Tensor  # [H, (h + 2k) D]
    qkv_bias: torch.Tensor | None  # [(h + 2k) D]
    q_norm: torch.Tensor | None  # [D]
    k_norm: torch.Tensor | None  # [D]
    out: torch.Tensor  # [h D, H]
    out_bias: torch.Tensor | None  # [H]
    mlp_norm: torch.Tensor  # [H]
    gate_up: torch.Tensor  # [H, 2I]
    gate_up_bias: torch.Tensor | None  # [2I]
    down: torch.Tensor  # [H, I]
    down_bias: torch.Tensor | None  # [H]


class Decoder:
    """Weights and forward passes of one model.

    Args:
        config: a `transformers` config of a Qwen2, Qwen3 or Llama model.
        device, dtype: where and in what type the replica lives.

    Raises:
        UserError: the family is not supported, or the config asks for something the decoder does not do.
    """

    def __init__(self, config, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32):
        check_supported(config)
        self.device, self.dtype = torch.device(device), dtype
        self.num_layers, self.hidden, self.vocab = config.num_hidden_layers, config.hidden_size, config.vocab_size
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = getattr(config, "head_dim", None) or self.hidden // self.heads
        self.intermediate, self.eps = config.intermediate_size, config.rms_norm_eps
        self.tied = bool(config.tie_word_embeddings)
        inv_freq, self.rope_scale = rope_frequencies(config)
        self.inv_freq = inv_freq.to(self.device, torch.float32)  # [D/2]
        self.angles = self._angles(256)  # [positions, D/2] complex, grown when needed

        qkv_bias = config.model_type == "qwen2" or bool(getattr(config, "attention_bias", False))
        out_bias = config.model_type != "qwen2" and bool(getattr(config, "attention_bias", False))
        mlp_bias = bool(getattr(config, "mlp_bias", False))
        qk_norm = config.model_type == "qwen3"
        H, D, I = self.hidden, self.head_dim, self.intermediate
        qkv_out = (self.heads + 2 * self.kv_heads) * D

        def new(*shape):
            return torch.empty(*shape, device=self.device, dtype=dtype)

        self.embed = new(self.vocab, H)
        self.norm = new(H)
        # [H, V]: on the CPU stored that way round, also when tied: faster for few rows.
        self.copied = self.tied and self.device.type == "cpu"
        if self.tied:
            self.head = self.embed.T.contiguous() if self.copied else self.embed.T
        else:
            self.head = new(H, self.vocab) if self.device.type == "cpu" else new(self.vocab, H).T
        self.layers = [
            Layer(
                attn_norm=new(H),
                qkv=new(H, qkv_out),
                qkv_bias=new(qkv_out) if qkv_bias else None,
                q_norm=new(D) if qk_norm else None,
                k_norm=new(D) if qk_norm else None,
                out=new(self.heads * D, H),
                out_bias=new(H) if out_bias else None,
                mlp_norm=new(H),
                gate_up=new(H, 2 * I),
                gate_up_bias=new(2 * I) if mlp_bias else None,
                down=new(H, I),
                down_bias=new(H) if mlp_bias else None,
            )
            for _ in range(self.num_layers)
        ]
        self.destinations = self._destinations()

    @classmethod
    def from_model(cls, model, device=None, dtype=None) -> "Decoder":
        """Replica of a live `transformers` model."""
        first = next(model.parameters())
        decoder = cls(model.config, device or first.device, dtype or first.dtype)
        decoder.load(model.named_parameters())
        return decoder

    # ------------------------------------------------------------------------------------------------- weights

    def _destinations(self) -> dict[str, torch.Tensor]:
        """Return {Hugging Face name: view into the replica with that tensor's own shape, or split by head}."""
        D, h, k = self.head_dim, self.heads, self.kv_heads
        where = {"model.embed_tokens.weight": self.embed, "model.norm.weight": self.norm}
        if not self.tied:
            where["lm_head.weight"] = self.head.T

        def interleaved(columns, heads):  # [..., heads D] -> [heads, 2, D/2, ...], pairs (i, i + D/2) side by side
            return columns.movedim(-1, 0).unflatten(0, (heads, D // 2, 2)).transpose(1, 2)

        for i, layer in enumerate(self.layers):
            at = f"model.layers.{i}."
            where[at + "input_layernorm.weight"] = layer.attn_norm
            where[at + "post_attention_layernorm.weight"] = layer.mlp_norm
            where[at + "self_attn.o_proj.weight"] = layer.out.T
            where[at + "mlp.gate_proj.weight"] = layer.gate_up[:, : self.intermediate].T
            where[at + "mlp.up_proj.weight"] = layer.gate_up[:, self.intermediate :].T
            where[at + "mlp.down_proj.weight"] = layer.down
            for kind, merged in (("weight", layer.qkv), ("bias", layer.qkv_bias)):
                if merged is None:
                    continue
                where[at + f"self_attn.q_proj.{kind}"] = interleaved(merged[..., : h * D], h)
                where[at + f"self_attn.k_proj.{kind}"] = interleaved(merged[..., h * D : (h + k) * D], k)
                where[at + f"self_attn.v_proj.{kind}"] = merged[..., (h + k) * D :].movedim(-1, 0)
            if layer.q_norm is not None:
                where[at + "self_attn.q_norm.weight"] = layer.q_norm.view(D // 2, 2).T
                where[at + "self_attn.k_norm.weight"] = layer.k_norm.view(D // 2, 2).T
            if layer.out_bias is not None:
                where[at + "self_attn.o_proj.bias"] = layer.out_bias
            if layer.gate_up_bias is not None:
                where[at + "mlp.gate_proj.bias"] = layer.gate_up_bias[: self.intermediate]
                where[at + "mlp.up_proj.bias"] = layer.gate_up_bias[self.intermediate :]
                where[at + "mlp.down_proj.bias"] = layer.down_bias
        return where

    @torch.no_grad()
    def load(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Copy weights in place by their Hugging Face names, a tied output embedding left out; called once after every
        optimiser step.

        Raises:
            UserError: a weight is missing, unknown or of another shape: these are not the weights of this config.
        """
        missing = set(self.destinations)
        for name, tensor in tensors:
            view = self.destinations.get(name)
            if view is None:
                raise UserError(
                    f"weight '{name}' is not part of a {self.num_layers}-layer model of the config's family."
                )
            if tensor.numel() != view.numel() or (tensor.dim() > 1 and tensor.shape[-1] != view.shape[-1]):
                raise UserError(f"weight '{name}' has shape {list(tensor.shape)}, which the config does not ask for.")
            view.copy_(tensor.detach().view(view.shape))
            missing.discard(name)
        if missing:
            raise UserError(f"{len(missing)} weights are missing, among them '{min(missing)}'.")
        if self.copied:
            self.head.copy_(self.embed.T)

    # ------------------------------------------------------------------------------------------------- forward

    def new_cache(self, rows: int, columns: int) -> torch.Tensor:
        """Return an empty cache [L, S, 2k, T, D]: keys in the first k heads, values in the last k."""
        return torch.zeros(
            self.num_layers, rows, 2 * self.kv_heads, columns, self.head_dim, device=self.device, dtype=self.dtype
        )

    def cache_bytes_per_token(self) -> int:
        """Bytes of cache one token takes: 2 x layers x key/value heads x head size x bytes of the type."""
        return self.num_layers * 2 * self.kv_heads * self.head_dim * self.dtype.itemsize

    def reserve_positions(self, n: int) -> None:
        """Make sure rotary angles exist for positions below n."""
        if n > len(self.angles):
            self.angles = self._angles(max(n, 2 * len(self.angles)))

    def _angles(self, n: int) -> torch.Tensor:
        theta = torch.outer(torch.arange(n, device=self.device, dtype=torch.float32), self.inv_freq)
        return torch.polar(torch.full_like(theta, self.rope_scale), theta)  # [n, D/2]

    def _qkv(self, layer: Layer, y, norm) -> torch.Tensor:
        """Return queries, keys and values [R, h + 2k, D] of the normed hidden states y [R, H], not yet rotated."""
        h, k = self.heads, self.kv_heads
        qkv = y @ layer.qkv if layer.qkv_bias is None else torch.addmm(layer.qkv_bias, y, layer.qkv)
        qkv = qkv.view(-1, h + 2 * k, self.head_dim)
        if layer.q_norm is not None:
            q = norm(qkv[:, :h], layer.q_norm, self.eps)
            key = norm(qkv[:, h : h + k], layer.k_norm, self.eps)
            qkv = torch.cat((q, key, qkv[:, h + k :]), dim=1)
        return qkv

    def _gated(self, layer: Layer, y) -> torch.Tensor:
        """Return the inside of the MLP [R, I]."""
        y = y @ layer.gate_up if layer.gate_up_bias is None else torch.addmm(layer.gate_up_bias, y, layer.gate_up)
        gate, up = y.chunk(2, dim=-1)
        return F.silu(gate) * up

    def _layer(self, layer: Layer, x, angles, attend):
        """One layer on x [R, H]; angles [R, 1, D/2]; attend(q [R, h, D], kv [R, 2k, D]) -> [R, h D]."""
        D, h, k = self.head_dim, self.heads, self.kv_heads
        qkv = self._qkv(layer, rms_norm(x, layer.attn_norm, self.eps), rms_norm)
        if x.dtype == torch.float32:
            torch.view_as_complex(qkv.view(-1, h + 2 * k, D // 2, 2))[:, : h + k].mul_(angles)
        else:
            pairs = torch.view_as_complex(qkv[:, : h + k].float().unflatten(-1, (D // 2, 2)))
            qkv[:, : h + k] = torch.view_as_real(pairs * angles).flatten(-2)
        a = attend(qkv[:, :h], qkv[:, h:])
        x = torch.addmm(x, a, layer.out)
        if layer.out_bias is not None:
            x = x + layer.out_bias
        x = torch.addmm(x, self._gated(layer, rms_norm(x, layer.mlp_norm, self.eps)), layer.down.T)
        return x if layer.down_bias is None else x + layer.down_bias

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        """Return fp32 logits [B, V] of the last hidden states x [B, H], before the final norm."""
        return self._head(rms_norm(x, self.norm, self.eps))

    def _head(self, y: torch.Tensor) -> torch.Tensor:
        if y.dtype == torch.float32:
            return y @ self.head
        if y.is_cuda:  # bf16 weights, but the sum is never rounded to bf16: those steps are 0.1 wide near a logit of 20
            return torch.mm(y, self.head, out_dtype=torch.float32)
        return y.float() @ self.head.float()

    def prefill(self, tokens: torch.Tensor, lengths: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Run fresh prompts [B, n], right-padded; causal attention never lets a real token see the padding.

        Returns:
            logits [B, V] after each row's last token, and the new cache entries [L, B, 2k, n, D] (padding included).
        """
        B, n = tokens.shape
        k = self.kv_heads
        angles = self.angles[:n].repeat(B, 1).unsqueeze(1)
        # Written layer by layer: views of all layers' qkv, stacked at the end, would keep the queries and take twice.
        new = torch.empty(self.num_layers, B, 2 * k, n, self.head_dim, device=tokens.device, dtype=self.dtype)
        layers = iter(new)

        def attend(q, kv):
            kv = next(layers).copy_(kv.reshape(B, n, 2 * k, self.head_dim).transpose(1, 2))
            q, key, value = q.reshape(B, n, self.heads, -1).transpose(1, 2), kv[:, :k], kv[:, k:]
            a = F.scaled_dot_product_attention(q, key, value, is_causal=True, enable_gqa=self.heads != k)
            return a.transpose(1, 2).reshape(B * n, -1)

        x = F.embedding(tokens.flatten(), self.embed)
        for layer in self.layers:
            x = self._layer(layer, x, angles, attend)
        last = x.view(B, n, -1)[torch.arange(B, device=x.device), lengths - 1]
        return self.logits(last), new

    def prefill_packed(self, tokens: torch.Tensor, lengths: list[int], attention) -> tuple[torch.Tensor, list]:
        """Run fresh prompts one behind the other [R], without padding.

        Args:
            attention: flash-attn's flash_attn_varlen_func.

        Returns:
            logits [B, V] after each prompt's last token, and the new cache entries of each prompt [L, 2k, n, D].
        """
        k, longest = self.kv_heads, max(lengths)
        position = torch.cat([torch.arange(n) for n in lengths]).to(tokens.device)
        ends = torch.tensor(lengths).cumsum(0)
        edges = F.pad(ends, (1, 0)).to(tokens.device, torch.int32)  # [B + 1]
        angles = self.angles[position].unsqueeze(1)
        new = torch.empty(self.num_layers, 2 * k, len(tokens), self.head_dim, device=tokens.device, dtype=self.dtype)
        layers = iter(new)

        def attend(q, kv):
            next(layers).copy_(kv.transpose(0, 1))
            a = attention(q, kv[:, :k], kv[:, k:], edges, edges, longest, longest, causal=True)
            return a.reshape(len(tokens), -1)

        x = F.embedding(tokens, self.embed)
        for layer in self.layers:
            x = self._layer(layer, x, angles, attend)
        return self.logits(x[ends.to(x.device) - 1]), list(new.split(lengths, dim=2))

    def extend(self, tokens, lengths, start, past) -> tuple[torch.Tensor, torch.Tensor]:
        """Run more tokens [B, n] (right-padded) after `start` [B] cached ones.

        `past` [L, B, 2k, T, D] holds the cached entries and has room for n more after the longest; new entries are
        written into it in place. Returns logits [B, V] after each row's last token, and `past`.
        """
        B, n = tokens.shape
        k, T = self.kv_heads, past.shape[3]
        column = start.unsqueeze(1) + torch.arange(n, device=tokens.device)  # [B, n] position of each new token
        angles = self.angles[column.flatten()].unsqueeze(1)
        rows = torch.arange(B, device=tokens.device).unsqueeze(1)
        # New token i of a row sees its past and the new tokens up to itself. Padding writes behind every real token.
        seen = torch.arange(T, device=tokens.device) <= column.unsqueeze(-1)  # [B, n, T]
        layers = iter(past)

        def attend(q, kv):
            cache = next(layers)
            cache.transpose(1, 2)[rows, column] = kv.reshape(B, n, 2 * k, self.head_dim)
            key, value = cache[:, :k], cache[:, k:]
            q = q.reshape(B, n, self.heads, -1).transpose(1, 2)
            a = F.scaled_dot_product_attention(q, key, value, attn_mask=seen.unsqueeze(1), enable_gqa=self.heads != k)
            return a.transpose(1, 2).reshape(B * n, -1)

        x = F.embedding(tokens.flatten(), self.embed)
        for layer in self.layers:
            x = self._layer(layer, x, angles, attend)
        last = x.view(B, n, -1)[torch.arange(B, device=x.device), lengths - 1]
        return self.logits(last), past

    def decode(self, tokens: torch.Tensor, position: torch.Tensor, cache: torch.Tensor, columns: int) -> torch.Tensor:
        """Run one token [B] for the first B cache rows, each at its own position [B]; return logits [B, V].

        Writes the new entries into `cache` and reads its first `columns` columns: shapes depend on B and `columns`
        alone and nothing is read back, so this is the function a CUDA graph captures.
        """
        B = len(tokens)
        k, T, D = self.kv_heads, cache.shape[3], self.head_dim
        angles = self.angles[position].unsqueeze(1)
        slot = torch.arange(B * 2 * k, device=tokens.device).view(B, 2 * k) * T  # flat index of (row, head, column)
        slot = slot.add_(position.unsqueeze(1)).flatten()
        seen = torch.arange(columns, device=tokens.device) <= position.unsqueeze(1)
        mask = torch.zeros(B, 1, 1, columns, device=tokens.device, dtype=self.dtype)
        mask.masked_fill_(~seen[:, None, None], float("-inf"))
        layers = iter(cache)

        def attend(q, kv):
            layer = next(layers)
            layer.view(-1, D).index_copy_(0, slot, kv.reshape(-1, D))
            key, value = layer[:B, :k, :columns], layer[:B, k:, :columns]
            # The h/k query heads of a group stand as if they were so many positions: no copy of keys and values.
            q = q.view(B, k, self.heads // k, D)
            return F.scaled_dot_product_attention(q, key, value, attn_mask=mask).reshape(B, -1)

        x = F.embedding(tokens, self.embed)
        for layer in self.layers:
            x = self._layer(layer, x, angles, attend)
        return self.logits(x)

    def decode_paged(
        self, tokens: torch.Tensor, position: torch.Tensor, cache: torch.Tensor, table: torch.Tensor
    ) -> torch.Tensor:
        """Run one token [B] for B rows of the page table [B, W], each at its own position [B]; return logits [B, V].

        `cache` is [L, P, 2k, C, D]. Shapes depend on B and the table's, nothing is read back. Each norm adds what the
        half layer before it has computed to the residual stream, in the same pass.
        """
        norm, lengths = kernels.rms_norm, position + 1
        residual, x = F.embedding(tokens, self.embed), None
        for layer, entries in zip(self.layers, cache):
            if x is None:
                y = norm(residual, layer.attn_norm, self.eps)
            else:
                y = norm(x, layer.attn_norm, self.eps, residual)
            q = kernels.rope_and_store(self._qkv(layer, y, norm), self.angles, position, entries, table)
            a = kernels.decode_attention(q, entries, lengths, table)
            x = a @ layer.out if layer.out_bias is None else torch.addmm(layer.out_bias, a, layer.out)
            y = self._gated(layer, norm(x, layer.mlp_norm, self.eps, residual))
            x = y @ layer.down.T if layer.down_bias is None else torch.addmm(layer.down_bias, y, layer.down.T)
        return self._head(norm(x, self.norm, self.eps, residual))


@functools.cache
def varlen_attention():
    """Return flash-attn's attention over packed sequences, or None where flash-attn is not installed."""
    if find_spec("flash_attn") is None:
        return None
    from flash_attn import flash_attn_varlen_func

    return flash_attn_varlen_func


def check_supported(config) -> None:
    """Raise UserError for a config the decoder would run wrongly; the message names what was found."""
    found = config.model_type
    if found not in FAMILIES:
        raise UserError(f"models of type {found} are not supported. Use Qwen2, Qwen3 or Llama.")
    sliding = "sliding_attention" in (getattr(config, "layer_types", None) or ())
    if sliding or getattr(config, "use_sliding_window", False):
        raise UserError(
            "sliding-window attention is not supported. Set use_sliding_window to false in its config.json."
        )
    if config.hidden_act != "silu":
        raise UserError(f"{found} config with hidden_act '{config.hidden_act}': only silu is supported.")
    rope = config.rope_parameters.get("rope_type", "default")
    if rope not in ("default", "linear", "llama3", "yarn"):
        raise UserError(f"{found} config with rope type '{rope}': supported are default, linear, llama3 and yarn.")


def rope_frequencies(config) -> tuple[torch.Tensor, float]:
    """Return the rotary frequencies [D/2] fp32 and the factor on cos and sin, as `transformers` computes them."""
    rope = config.rope_parameters
    if rope.get("rope_type", "default") != "default":
        return ROPE_INIT_FUNCTIONS[rope["rope_type"]](config, "cpu")
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 1.0 / rope["rope_theta"] ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim), 1.0
