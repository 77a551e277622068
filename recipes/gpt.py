"""A small GPT (decoder-only transformer) on the bytes or characters of any text file."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from recipes.base import Recipe
from recipes.parts.data import Splits
from recipes.parts.optim import Optim, decay_groups
from recipes.parts.option_types import Fraction, OptionGroup, PositiveInt
from recipes.parts.schedule import Schedule
from recipes.parts.text import Text

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.optim import Optimizer
    from torchmetrics import Metric


@dataclass(kw_only=True)
class Model(OptionGroup):
    """`model.*`"""

    layers: PositiveInt = 4
    """decoder blocks"""
    heads: PositiveInt = 4
    """attention heads of a block"""
    width: PositiveInt = 128
    """size of a token's vector"""
    dropout: Fraction = 0.1
    """fraction of activations and attention weights dropped in training"""

    def check(self, declared: Model | None = None) -> None:  # noqa: ARG002  # every option has an effect
        """Raise ValueError for a width that the heads cannot share."""
        if self.width % self.heads:
            raise ValueError(
                f"model.width={self.width} over model.heads={self.heads} heads: give a multiple of the heads"
            )


@dataclass(kw_only=True)
class GPT(Recipe):
    """Next-token prediction with AdamW and a cosine; the loss is in nats a token."""

    defaults: ClassVar[dict[str, Any]] = {"batch_size": 32, "micro_batch_size": 8, "steps": 300}
    item_name: ClassVar[str] = "tokens"

    model: Model = field(default_factory=Model)
    data: Text = field(default_factory=Text)
    optim: Optim = field(
        default_factory=lambda: Optim(name="adamw", lr=2e-3, betas=(0.9, 0.95), weight_decay=0.1)
    )
    schedule: Schedule = field(default_factory=lambda: Schedule(name="cosine", warmup=0.1))

    def build_data(self) -> Splits:
        """As `data.*` says."""
        return self.data.build()

    def build_model(self) -> nn.Module:
        """The decoder, with its `init_weights` left to the caller, who may shard first."""
        from recipes.parts.transformer import Decoder

        shape = self.model
        return Decoder(
            vocabulary=self.data.vocabulary_size,
            block=self.data.block,
            width=shape.width,
            heads=shape.heads,
            layers=shape.layers,
            dropout=shape.dropout,
        )

    def build_optimizer(self, model: nn.Module) -> Optimizer:
        """Weight decay on matrices, not on biases and norms."""
        return self.optim.build(decay_groups(model))

    def blocks(self, model: nn.Module) -> Iterable[nn.Module]:
        """The decoder blocks."""
        return model.get_submodule("blocks").children()

    def items_per_sample(self) -> int:
        """Tokens predicted: each window is full."""
        return self.data.block

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """Cross entropy, summed over tokens."""
        return self.eval_step(model, batch)[0]

    def eval_step(self, model: nn.Module, batch: Any) -> tuple[Tensor, Tensor, Tensor]:
        """(loss, logits [batch * time, vocabulary], the true tokens [batch * time])."""
        from torch.nn import functional as F

        tokens, targets = batch
        logits = model(tokens).flatten(0, 1)
        return F.cross_entropy(logits, targets.flatten(), reduction="sum"), logits, targets.flatten()

    def metrics(self) -> Mapping[str, Metric]:
        """Fraction of tokens predicted right."""
        from torchmetrics.classification import MulticlassAccuracy

        return {"accuracy": MulticlassAccuracy(self.data.vocabulary_size, average="micro")}
