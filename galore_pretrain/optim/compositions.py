"""The rules of the shipped methods, each composed of a wrapper, a rule and a moment store.

The table of methods names them (`Method.home`, `Method.companion`); that is the only way to them.
"""

from dataclasses import dataclass
from typing import Any

from galore_pretrain.optim.adafactor import Adafactor
from galore_pretrain.optim.adam import Adam
from galore_pretrain.optim.galore import GaLore
from galore_pretrain.optim.moments import Blockwise8bit, Dense
from galore_pretrain.optim.natural import Natural
from galore_pretrain.optim.rule import UpdateRule
from galore_pretrain.optim.sgd import SGD


@dataclass(frozen=True)
class Composition:
    """A rule in two versions: as it should be, and as published code computes it.

    That is the code of torch, transformers, bitsandbytes and the methods' authors.
    """

    sound: UpdateRule
    reference: UpdateRule


# Published code keeps a bf16 moment in bf16 arithmetic, rounded to nearest.
_NEAREST = Dense(rounding="nearest")
_8BIT = Blockwise8bit()


def _published(inner: UpdateRule, **options: Any) -> GaLore:
    """Return ``inner`` in the GaLore authors' own projection: a fresh SVD of every matrix at the same update."""
    return GaLore(
        inner,
        basis="svd_unsigned",
        refresh="together",
        published=True,
        **options,
    )


sgd = Composition(
    sound=SGD(),
    reference=SGD(store=_NEAREST),
)
adam = Composition(
    sound=Adam(decay="l2"),
    reference=Adam(decay="l2", store=_NEAREST),
)
adamw = Composition(
    sound=Adam(),
    reference=Adam(store=_NEAREST),
)
# Both numerics are bitsandbytes' own: its kernel rounds to the nearest of 256 values whatever is asked for.
adamw8bit = Composition(
    sound=Adam(store=_8BIT),
    reference=Adam(store=_8BIT),
)
adafactor = Composition(
    sound=Adafactor(),
    reference=Adafactor(published=True),
)

# Where the GaLore authors' code does not project, it runs these; they are not torch's AdamW.
authors_adamw = Composition(
    sound=Adam(),
    reference=Adam(eps=1e-6, formula="transformers", decay="after", store=_NEAREST),
)
authors_adamw8bit = Composition(
    sound=Adam(store=_8BIT),
    reference=Adam(eps=1e-6, decay="after", store=_8BIT),
)

galore_adamw = Composition(
    sound=GaLore(Adam()),
    reference=_published(authors_adamw.reference),
)
# The authors hand bitsandbytes a low-rank scratch tensor as the weight, so the learning rate is already in it.
galore_adamw8bit = Composition(
    sound=GaLore(Adam(store=_8BIT)),
    reference=_published(Adam(decay="after", scaled=True, store=_8BIT)),
)
# The authors' Adafactor converts the whole gradient to fp32 before it projects.
galore_adafactor = Composition(
    sound=GaLore(Adafactor()),
    reference=_published(Adafactor(published=True), upcast=True),
)
natural_galore = Composition(
    sound=GaLore(Natural(Adam())),
    reference=_published(Natural(authors_adamw.reference)),
)
# The history of gradients takes 10 times the room of Adam's moments, so it is kept in 8 bits as well.
natural_galore8bit = Composition(
    sound=GaLore(Natural(Adam(store=_8BIT), store=_8BIT)),
    reference=_published(Natural(authors_adamw8bit.reference, store=_8BIT)),
)
