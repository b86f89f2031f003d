"""What is measured: shapes, work, and the bar for each. Both the runs and the tables read it."""

from typing import Literal, NamedTuple

from benchmarks.gpu import floors
from benchmarks.gpu.floors import Cost

DENSITY = 0.1
PERCDAMP = 0.01
NOMINAL_ITERATIONS = 20  # of the exact solve, for floors where none was measured

Kind = Literal["share", "ratio", "seconds", "bytes"]


class Bar(NamedTuple):
    """What is asked for: at least a share of the floor or a ratio, at most seconds or bytes."""

    kind: Kind
    value: float

    def met(self, measured: float) -> bool:
        """Whether a measured value is good enough; NaN never is."""
        least = self.kind in ("share", "ratio")
        return measured >= self.value if least else measured <= self.value

    def __str__(self) -> str:
        if self.kind == "bytes":
            return f"memory <= {self.value / 2**30:.4g} GiB"
        sign = ">=" if self.kind in ("share", "ratio") else "<="
        return f"{self.kind} {sign} {self.value:.4g}"


class Entry(NamedTuple):
    """One piece of work.

    Attributes:
        work: what is computed; names the maker in ``kernels``.
        shape: sizes as they stand in the table.
        dtype: of the inputs.
        sizes: what the maker is given.
        cost: for the floor.
        bars: what is asked for.
    """

    work: str
    shape: str
    dtype: str
    sizes: tuple[int, ...]
    cost: Cost
    bars: tuple[Bar, ...] = ()


class Data(NamedTuple):
    """Calibration data: how many sequences of how many tokens."""

    sequences: int
    tokens: int

    def __str__(self) -> str:
        return f"{self.sequences} x {self.tokens} tokens"


class Linear(NamedTuple):
    """One linear layer of a block; layers with the same ``input`` share a Gram."""

    name: str
    rows: int
    cols: int
    input: str


class Model(NamedTuple):
    """Shapes of a language model."""

    name: str
    hidden: int
    intermediate: int
    layers: int
    vocabulary: int
    heads: int

    @property
    def linears(self) -> tuple[Linear, ...]:
        """The seven linears of one block."""
        h, i = self.hidden, self.intermediate
        qkv = (Linear(f"{name}_proj", h, h, "attention") for name in "qkv")
        gated = (Linear(f"{name}_proj", i, h, "mlp") for name in ("gate", "up"))
        return (
            *qkv,
            Linear("o_proj", h, h, "heads"),
            *gated,
            Linear("down_proj", h, i, "gated"),
        )

    @property
    def inputs(self) -> dict[str, int]:
        """Columns of each distinct input of a block."""
        return {linear.input: linear.cols for linear in self.linears}

    def matrices(self, layers: int) -> list[tuple[int, int]]:
        """Shapes of the weights of ``layers`` blocks, embedding and head."""
        ends = [(self.vocabulary, self.hidden)] * 2
        return [(linear.rows, linear.cols) for linear in self.linears] * layers + ends

    def weights(self, layers: int) -> int:
        """How many weights those have."""
        return sum(rows * cols for rows, cols in self.matrices(layers))


MODEL_7B = Model("7B", 4096, 11008, 32, 32000, 32)
MODEL_13B = Model("13B", 5120, 13824, 40, 32000, 40)
MODEL_DRY = Model("tiny", 16, 24, 2, 64, 4)
DATA, DATA_DRY = Data(128, 2048), Data(4, 24)
TOKENS = 65536
TOKENS_DRY = 96


def streamed(model: Model, layers: int, normalize: str) -> Entry:
    """``select_patch`` over all weights of a model, tensor after tensor."""
    salience = normalize == "none"
    weights = model.weights(layers)
    columns = 0 if salience else sum(cols for _, cols in model.matrices(layers))
    return Entry(
        f"select {'salience' if salience else 'fused'}",
        f"{model.name}: {layers} blocks and {weights / 1e9:.2f}e9 weights",
        "bfloat16",
        (layers,),
        floors.select(weights, 2, columns),
        (Bar("share", 0.8 if salience else 0.6),),
    )


def kernel_entries(model: Model, tokens: int) -> list[Entry]:
    """The ops at the shapes of one model, but for ``streamed``, whose size the card decides."""
    wide, tall = model.intermediate, model.hidden
    n = tall * wide
    kept = int(DENSITY * n)
    pair = f"[{tall}, {wide}]"
    found = [
        Entry("select tensor", pair, "bfloat16", (tall, wide), floors.select(n, 2, wide)),
        Entry("topk_mask", pair, "float32", (tall, wide), floors.topk(n, 4)),
    ]
    for cols in (tall, wide):
        shape, sizes = f"[{tokens}, {cols}]", (tokens, cols)
        found += [
            Entry(
                "gram", shape, "bfloat16", sizes, floors.gram(tokens, cols, 2), (Bar("ratio", 1.4),)
            ),
            Entry(
                "gram_diag",
                shape,
                "bfloat16",
                sizes,
                floors.gram_diag(tokens, cols, 2),
                (Bar("share", 0.8),),
            ),
        ]
    cost = floors.cross_gram(tokens, tall, tall, 2)
    found.append(Entry("cross_gram", f"[{tokens}, {tall}] twice", "bfloat16", (tokens, tall), cost))
    found.append(Entry("encode_patch", pair, "bfloat16", (tall, wide), floors.encode(n, 2, kept)))
    cost, bars = floors.apply(n, 2, kept), (Bar("share", 0.7),)
    found.append(Entry("apply_patch_", pair, "bfloat16", (tall, wide), cost, bars))
    return found


BLOCK_BARS = {
    "exact": (Bar("seconds", 0.2), Bar("ratio", 20)),
    "obs": (Bar("ratio", 50),),
    "obs sweep": (Bar("seconds", 0.08),),
}
END_TO_END_BARS = (Bar("ratio", 10), Bar("bytes", 8 * 2**30))


def block_cost(model: Model, mode: str, iterations: int = NOMINAL_ITERATIONS) -> Cost:
    """All seven linears of a block, Grams given; the factorisation is apart."""
    total = Cost(0)
    for linear in model.linears:
        rows, cols = linear.rows, linear.cols
        exact = mode == "exact"
        total += (
            floors.decorate_exact(rows, cols, iterations) if exact else floors.sweep(rows, cols)
        )
    return total


def factor_cost(model: Model) -> Cost:
    """The factor of each distinct Gram of a block, once."""
    total = Cost(0)
    for cols in model.inputs.values():
        total += floors.factor(cols)
    return total
