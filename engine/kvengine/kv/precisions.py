"""Several precisions in one pool. No torch.

A block is a number of bytes, and all of its tokens are of one precision: in a quarter of the bits it holds
four times as many tokens. So the pool, its accounting and its invariants know nothing of precisions, and a
sequence that is stored smaller really takes fewer blocks. What they all share is one small integer,
`Request.packing`: how many of its tokens lie where one of the pool's own precision would.
"""

from dataclasses import dataclass

from kvkernels.precision import BF16, FP32, INT4, INT8, Precision


@dataclass(frozen=True, slots=True)
class Precisions:
    """`own` is the pool's, the widest; `eight` is the format of eight bits, int8 or fp8."""

    own: Precision = FP32
    eight: Precision = INT8

    @property
    def offered(self) -> tuple[Precision, ...]:
        """Widest first."""
        narrower = [one for one in (BF16, self.eight, INT4) if one.bits < self.own.bits]
        return (self.own, *narrower)

    def at(self, packing: int) -> Precision:
        """What sequences of this packing are stored in."""
        return next(one for one in self.offered if one.bits * packing == self.own.bits)

    def packing(self, bits: float | None) -> int:
        """Of a sequence that is to be stored in at most `bits` an element; None: in the pool's own.

        Below the narrowest there is nothing: that one then.
        """
        if bits is None:
            return 1
        fitting = [one for one in self.offered if one.bits <= bits] or [self.offered[-1]]
        return self.own.bits // fitting[0].bits


FULL = Precisions()
"""A pool of fp32."""


def fine_packing(precisions: Precisions) -> int:
    """Of the precision whose vectors have scales of their own; 0 where none is offered that has."""
    return next((precisions.own.bits // one.bits for one in precisions.offered if one.fine), 0)


def fine_bytes(precisions: Precisions, layers: int, kv_heads: int) -> int:
    """Of such scales, for a token at the pool's own precision: a block has room for all that it could hold,
    one byte for each K and V of each head.
    """
    return fine_packing(precisions) * layers * 2 * kv_heads


def scale_bytes(precisions: Precisions, layers: int, kv_width: int) -> int:
    """What `kv.storage` keeps beside the pool: scale, inverse and reach of each channel, in fp32."""
    scaled = sum(one.scaled for one in precisions.offered)
    return scaled * 3 * layers * kv_width * 4
