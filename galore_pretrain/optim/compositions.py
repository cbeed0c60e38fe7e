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
    """A rule as it should be, and as published code computes it.

    That is the code of torch, transformers, bitsandbytes and the methods' authors.
    """

    sound: UpdateRule
    reference: UpdateRule


_NEAREST, _8BIT = Dense(rounding="nearest"), Blockwise8bit()


def _published(inner: UpdateRule, **options: Any) -> GaLore:
    return GaLore(inner, basis="svd_unsigned", refresh="together", published=True, **options)


sgd = Composition(SGD(), SGD(store=_NEAREST))
adam = Composition(Adam(decay="l2"), Adam(decay="l2", store=_NEAREST))
adamw = Composition(Adam(), Adam(store=_NEAREST))
adamw8bit = Composition(Adam(store=_8BIT), Adam(store=_8BIT))
adafactor = Composition(Adafactor(), Adafactor(published=True))

# Where the GaLore authors' code does not project, it runs these; they are not torch's AdamW.
authors_adamw = Composition(Adam(), Adam(eps=1e-6, formula="transformers", decay="after", store=_NEAREST))
authors_adamw8bit = Composition(Adam(store=_8BIT), Adam(eps=1e-6, decay="after", store=_8BIT))

galore_adamw = Composition(GaLore(Adam()), _published(authors_adamw.reference))
galore_adamw8bit = Composition(
    GaLore(Adam(store=_8BIT)),
    _published(Adam(decay="after", scaled=True, store=_8BIT)),
)
galore_adafactor = Composition(GaLore(Adafactor()), _published(Adafactor(published=True), upcast=True))
natural_galore = Composition(GaLore(Natural(Adam())), _published(Natural(authors_adamw.reference)))
natural_galore8bit = Composition(
    GaLore(Natural(Adam(store=_8BIT), store=_8BIT)),
    _published(Natural(authors_adamw8bit.reference, store=_8BIT)),
)
