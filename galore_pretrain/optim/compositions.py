"""The rules of the shipped methods, each composed of a wrapper, a rule and a moment store.

The table of methods names them (`Method.home`, `Method.companion`); that is the only way to them.
"""

from dataclasses import dataclass
from typing import Any

from galore_pretrain.optim.adafactor import Adafactor
from galore_pretrain.optim.adam import Adam
from galore_pretrain.optim.apollo import Apollo
from galore_pretrain.optim.fira import Fira
from galore_pretrain.optim.foam import Foam
from galore_pretrain.optim.galore import GaLore
from galore_pretrain.optim.moments import Blockwise8bit, Dense
from galore_pretrain.optim.muon import Muon
from galore_pretrain.optim.natural import Natural
from galore_pretrain.optim.projector import Tracked
from galore_pretrain.optim.rule import UpdateRule
from galore_pretrain.optim.scale import Scale
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

# APOLLO keeps no basis, and Fira's authors form no full update: nothing of the GaLore authors' own code is in them.
apollo = Composition(
    sound=Apollo(),
    reference=Apollo(Adam(eps=1e-6, formula="transformers", decay="after", store=_NEAREST)),
)
apollo_mini = Composition(
    sound=Apollo(rank=1, scale=128.0, channelwise=False),
    reference=Apollo(
        Adam(eps=1e-6, formula="transformers", decay="after", store=_NEAREST),
        rank=1,
        scale=128.0,
        channelwise=False,
    ),
)
# Their authors hold weights as 8-bit integers besides (`--weights int8`, in the recipes). Rounding is not as theirs:
# what they publish clips groups of one sign, and holds bases of 4 bits in bytes.
_q_galore = GaLore(Adam(betas=(0.9, 0.95), store=_8BIT), basis_store="int4", refresh="lazy")
_q_apollo = Apollo(Adam(store=_8BIT))
_q_apollo_mini = Apollo(Adam(store=_8BIT), rank=1, scale=128.0, channelwise=False)
q_galore = Composition(sound=_q_galore, reference=_q_galore)
q_apollo = Composition(sound=_q_apollo, reference=_q_apollo)
q_apollo_mini = Composition(sound=_q_apollo_mini, reference=_q_apollo_mini)
fira = Composition(
    sound=Fira(Adam()),
    reference=Fira(authors_adamw.reference, basis="svd_unsigned", refresh="together"),
)
# Published: an SVD at the first update, and moments that follow each later step of the basis.
subtrack = Composition(
    sound=Fira(Adam(), basis=Tracked(), moments="project"),
    reference=Fira(authors_adamw.reference, basis=Tracked(), moments="project", refresh="together"),
)
foam = Composition(
    sound=Foam(),
    reference=Foam(store=_NEAREST),
)
muon = Composition(
    sound=Muon(),
    reference=Muon(store=_NEAREST),
)
muon_rest = Composition(
    sound=Adam(betas=(0.9, 0.95)),
    reference=Adam(betas=(0.9, 0.95), store=_NEAREST),
)
scale = Composition(
    sound=Scale(),
    reference=Scale(),
)
scale_embedding = Composition(
    sound=Scale(axis="columns"),
    reference=Scale(axis="columns"),
)
scale_head = Composition(
    sound=Scale(momentum=0.9),
    reference=Scale(momentum=0.9, store=_NEAREST),
)

# The history of gradients takes 10 times the room of Adam's moments, so it is kept in 8 bits as well.
natural_galore8bit = Composition(
    sound=GaLore(Natural(Adam(store=_8BIT), store=_8BIT)),
    reference=_published(Natural(authors_adamw8bit.reference, store=_8BIT)),
)
