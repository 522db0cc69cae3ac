"""What our own networks have in common: attention with documents, padding or a cache; images among embeddings; loss and generation.

    hidden_states    ids, positions, pixels -> last hidden states; what the training loop calls
    forward          the same, and logits, loss and a cache; what transformers' `generate` calls

Attention has two modes. The reference mode is causal attention over each row, with a mask for padding and a cache for generation. The
packed mode (`model.packed = True`) takes one row of documents and lets none see another; their borders stand in `attention.SEGMENTS`.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy, pad, scaled_dot_product_attention
from transformers import Cache, DynamicCache, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from boxcar.train.network.attention import SEGMENTS, Segments, attend

IGNORED_LABEL = -100


@dataclass(frozen=True)
class Sight:
    """What each token may look at: made once a forward pass, handed to every layer (and kept by activation checkpointing)."""

    segments: Segments | None = None
    """Documents of a pack; the other fields are then unused."""
    mask: torch.Tensor | None = None
    """(B, 1, Q, K) bool, True where a query sees a key."""
    causal: bool = False
    """Every row is whole and begins here: the kernels know that mask themselves."""


def sight_of_pack(num_tokens: int) -> Sight:
    """The documents of the micro-batch in work."""
    segments = SEGMENTS.current
    assert segments is not None, "set SEGMENTS.current before the forward pass of a packed batch"
    assert segments.borders[-1] == num_tokens, "the segments are those of another batch"
    return Sight(segments=segments)


def sight_of_rows(num_queries: int, num_cached: int, attention_mask: torch.Tensor | None, device: torch.device) -> Sight:
    """attention_mask: (B, cached + queries), 0 at padding; None: there is none."""
    if attention_mask is not None and bool(attention_mask.all()):
        attention_mask = None
    if attention_mask is None and num_cached == 0:
        return Sight(causal=True)
    if attention_mask is None and num_queries == 1:
        return Sight()
    keys = torch.arange(num_cached + num_queries, device=device)
    queries = keys[num_cached:, None]
    mask = (keys <= queries)[None, None]
    if attention_mask is not None:
        mask = mask & attention_mask.bool()[:, None, None, :]
        # What sees nothing (padding on the left) sees itself: a softmax over nothing would be NaN, and spread through the values.
        mask = mask | (~mask.any(-1, keepdim=True) & (keys == queries))
    return Sight(mask=mask)


def text_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, sight: Sight, layer: int, past_key_values: Cache | None
) -> torch.Tensor:
    """query: (B, T, H, D); key, value: (B, T, H_kv, D), H a multiple of H_kv. Scaled by 1 / sqrt(D). Returns (B, T, H, D)."""
    if sight.segments is not None:
        return attend(query[0], key[0], value[0], sight.segments, scale=None, causal=True)[None]
    query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    if past_key_values is not None:
        key, value = past_key_values.update(key, value, layer)
    grouped = query.shape[1] != key.shape[1]
    out = scaled_dot_product_attention(query, key, value, attn_mask=sight.mask, is_causal=sight.causal, enable_gqa=grouped)
    return out.transpose(1, 2)


def rotate(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary embedding, halves of a head paired. states: (B, T, H, D); cos, sin: (B, T, D). The result has the tables' wider dtype."""
    first, second = states.chunk(2, dim=-1)
    turned = torch.cat((-second, first), dim=-1)
    return states * cos.unsqueeze(2) + turned * sin.unsqueeze(2)


def place_features(embeddings: torch.Tensor, image_mask: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
    """Put image features where the placeholders stand, in order. embeddings: (B, T, hidden); image_mask: (B, T) bool, True at as many
    places as features has rows; features: (images, placeholders of an image, hidden)."""
    places = image_mask.flatten().nonzero().squeeze(1)
    rows = features.flatten(0, 1).to(embeddings.dtype)
    assert len(places) == len(rows), f"{len(places)} placeholders for {len(features)} images of {features.shape[1]} features each"
    return embeddings.flatten(0, 1).index_copy(0, places, rows).view_as(embeddings)


class NativeModel(PreTrainedModel, GenerationMixin):
    """A language model that sees: the part of its interface that is the same in each of our networks.

    pixel_values are (images, 3, side, side), normalised, in the order of their placeholders; None: no image, and the vision tower rests
    (an empty tensor of no images runs it on nothing, so that its parameters get gradients of zero).
    image_mask is (B, T) bool, True at the placeholders; what padding stands there is sorted out by attention_mask.
    """

    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012  (a list, as transformers has it)

    packed: bool = False
    """Rows are packs of documents, as SEGMENTS.current says."""
    lm_head: nn.Linear

    def hidden_states(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        pixel_values: torch.Tensor | None = None,
        image_mask: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
    ) -> torch.Tensor:
        """input_ids, position_ids: (B, T) int64. Returns (B, T, hidden): the last hidden states, after the final norm."""
        raise NotImplementedError

    @property
    def vision_attention_width(self) -> int:
        """Hidden size of the vision tower times its layers: what the FLOPs of its attention over a whole image follow from."""
        raise NotImplementedError

    def positions(self, attention_mask: torch.Tensor, image_mask: torch.Tensor | None) -> torch.Tensor:
        """Position of each token of whole rows. attention_mask, image_mask: (B, T). Returns (B, T) int64."""
        raise NotImplementedError

    def get_output_embeddings(self) -> nn.Linear:
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        self.lm_head = new_embeddings

    def forward(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        image_mask: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool = False,
        logits_to_keep: int = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """labels: (B, T), -100 where there is no loss; the loss is the mean over the others, each predicted from the token before.
        logits_to_keep: of how many last tokens logits are made, 0 for all. What else transformers may pass changes nothing."""
        if position_ids is None:
            assert past_key_values is None, "with a cache, the positions depend on what is in it"
            assert not self.packed, "the positions of a pack begin anew with each document"
            position_ids = self.positions(torch.ones_like(input_ids) if attention_mask is None else attention_mask, image_mask)
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        states = self.hidden_states(input_ids, position_ids, pixel_values, image_mask, attention_mask, past_key_values)
        logits = self.lm_head(states[:, -logits_to_keep:])
        loss = None
        if labels is not None:
            loss = cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=IGNORED_LABEL)
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=past_key_values)

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.Tensor,
        *,
        past_key_values: Cache | None = None,
        attention_mask: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        image_mask: torch.Tensor | None = None,
        use_cache: bool = True,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """What `generate` feeds `forward` with. Positions are made anew from the masks of the whole row: what `generate` would continue by
        itself differs between versions of transformers, and knows nothing of images that share a position."""
        assert not self.packed, "generation has rows, not packs: set packed = False"
        num_cached = 0 if past_key_values is None else past_key_values.get_seq_length()
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        if image_mask is not None:
            image_mask = pad(image_mask, (0, input_ids.shape[1] - image_mask.shape[1]))
            # Where the placeholder is the padding id (CogVLM), `generate` takes the image for padding.
            attention_mask = attention_mask | image_mask
        positions = self.positions(attention_mask, image_mask)
        at_first = num_cached == 0
        return {
            "input_ids": input_ids[:, num_cached:],
            "position_ids": positions[:, num_cached:],
            "pixel_values": pixel_values if at_first else None,
            "image_mask": image_mask if at_first else None,
            "attention_mask": attention_mask,
            "past_key_values": past_key_values,
            "use_cache": use_cache,
            "logits_to_keep": 1,
        }

    def _look(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None, past_key_values: Cache | None) -> Sight:
        """The Sight of this batch in this mode."""
        num_rows, num_tokens = input_ids.shape
        if self.packed:
            assert num_rows == 1, "a packed batch is one row"
            assert past_key_values is None, "a pack has no cache"
            return sight_of_pack(num_tokens)
        num_cached = 0 if past_key_values is None else past_key_values.get_seq_length()
        return sight_of_rows(num_tokens, num_cached, attention_mask, input_ids.device)
