"""The table notation: patterns and name templates. Text in, frozen values out; docs/notation.md specifies it.

    "(heads head_dim + kv head_dim + kv head_dim) hidden"      one pattern, three leaves (q, k, v)
     └──────────── dimension 0: a sum ────────┘  └ dimension 1

Knows nothing about files, meshes or models.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

from ..errors import ReshardError
from ..inputs.limits import numeral

Product = tuple["str | Sum", ...]  # row-major, last fastest; a string is an axis, the empty product has size one


class Sum(NamedTuple):
    """The seam: terms lying one after another at one place of a product."""

    terms: tuple[Product, ...]


class Span(NamedTuple):
    """Where one leaf lies inside its stored tensor: first element and the step per axis, in elements."""

    offset: int
    strides: dict[str, int]


class Pattern(NamedTuple):
    """One product per stored dimension; `axes[i]` are the axes of leaf i, outermost first."""

    dims: tuple[Product, ...]
    axes: tuple[tuple[str, ...], ...]

    def measure(self, size: Callable[[int, str], int]) -> tuple[tuple[int, ...], tuple[Span, ...]]:
        """Shape of the stored tensor and the span of every leaf, when leaf i holds `size(i, axis)` elements along an
        axis.

        Raises ReshardError where leaves that share an axis in memory hold different amounts of it.
        """
        everyone = range(len(self.axes))
        shape = tuple(_extent(dim, everyone, size) for dim in self.dims)
        spans = [Span(0, {}) for _ in everyone]
        _place(tuple(node for dim in self.dims for node in dim), everyone, 0, 1, size, spans)
        return shape, tuple(spans)

    def refined(self, compounds: Mapping[str, tuple[str, ...]]) -> "Pattern":
        """The same pattern with further compound axes written out."""
        found = self.replaced(compounds)
        return self if found.dims == self.dims else found

    def replaced(self, products: Mapping[str, Product]) -> "Pattern":
        """The same pattern with products in place of axes; an axis that counts blocks counts those of its product.

        Raises ReshardError where a product cannot be counted in such blocks.
        """
        return _pattern(tuple(_replaced(dim, lambda axis: products.get(axis, (axis,))) for dim in self.dims))

    def of_parts(self, axes: Sequence[Sequence[str]], own: Callable[[str], object]) -> "Pattern | None":
        """The pattern in which parts of this one's leaves stand as the leaves do, when part i has `axes[i]`: some of
        the leaf's, whole or counted in blocks, and such as are a part's own; None where there is none.

        Dimensions are in the order in which the first part has them. One that the parts have nothing of is 1: left out
        unless leaves stand side by side along it, or the rest of the matrix is there.
        """
        everyone = range(len(self.axes))
        left = [list(own) for own in axes]
        dims = [_of_parts(dim, everyone, left) for dim in self.dims]
        if any(dim is None for dim in dims) or any(one != left[0] for one in left) or not all(map(own, left[0])):
            return None
        found = [dim for dim in dims if dim is not None]
        first = [_first(dim, axes[0]) for dim in found]
        seam = [any(isinstance(node, Sum) for node in dim) for dim in found]
        last = len(found) - 1
        other, bare = left[0], first[last - 1 :] == [None, None]  # bare: a number or some for all of the matrix
        placed = [(at, number, found[number]) for number, at in enumerate(first) if at is not None]
        placed += [(axes[0].index(axis), -1, (axis,)) for axis in other]
        placed.sort(key=lambda one: one[0])
        for number, at in enumerate(first):
            kept = seam[number] or (not other and (number == last - 1 and not seam[last] if bare else True))
            if at is None and kept:
                where = next((spot for spot, one in enumerate(placed) if not 0 <= one[1] < number), len(placed))
                placed.insert(where, (0, number, found[number]))
        return _pattern(tuple(dim for _, _, dim in placed))

    def only(self, leaf: int) -> "Pattern":
        """The pattern of one leaf alone."""
        return _pattern(tuple(_only(dim, range(len(self.axes)), leaf) for dim in self.dims))

    @property
    def text(self) -> str:
        """The pattern as `parse_pattern` reads it, compounds written out."""
        return " ".join(_dimension(dim) for dim in self.dims)

    def renamed(self, name: Callable[[str], str]) -> "Pattern":
        """The same pattern with other names for axes."""
        return _pattern(tuple(_replaced(dim, lambda axis: (name(axis),)) for dim in self.dims))


def _pattern(dims: tuple[Product, ...]) -> Pattern:
    return Pattern(dims, tuple(_paths(tuple(node for dim in dims for node in dim))))


def _replaced(product: Product, of: Callable[[str], Product]) -> Product:
    """A product with `of(axis)` in place of every axis; one that counts blocks counts those of its product."""
    nodes: list[str | Sum] = []
    for node in product:
        if isinstance(node, Sum):
            nodes.append(Sum(tuple(_replaced(term, of) for term in node.terms)))
        elif block := block_of(node):
            nodes.extend(in_blocks(tuple(one for axis in block[0] for one in of(axis)), block[1]))
        else:
            nodes.extend(of(node))
    return tuple(nodes)


def _of_parts(product: Product, leaves: range, left: Sequence[list[str]]) -> Product | None:
    """A product with what the parts have of its axes; these are taken off `left`. None where they differ."""
    plain = {node for node in product if isinstance(node, str)}
    here = [[axis for axis in left[leaf] if (block_of(axis) or ((axis,), 1))[0][0] in plain] for leaf in leaves]
    if any(own != here[0] or not bases(own) <= plain for own in here):
        return None
    first = {(block_of(axis) or ((axis,), 1))[0][0]: axis for axis in here[0]}
    for leaf in leaves:
        left[leaf][:] = [axis for axis in left[leaf] if axis not in here[0]]
    nodes: list[str | Sum] = []
    for node in product:
        if isinstance(node, Sum):
            terms = [_of_parts(term, own, left) for term, own in _shares(node, leaves)]
            if any(term is None for term in terms):
                return None
            nodes.append(Sum(tuple(term for term in terms if term is not None)))
        elif node in first:
            nodes.append(first[node])
    return tuple(nodes)


def _first(product: Product, axes: Sequence[str]) -> int | None:
    """Where the first of a product's axes stands among these; None of a product without axes."""
    return min((axes.index(axis) for path in _paths(product) for axis in path if axis in axes), default=None)


def _only(product: Product, leaves: range, leaf: int) -> Product:
    nodes: list[str | Sum] = []
    for node in product:
        if isinstance(node, Sum):
            nodes += next(_only(term, own, leaf) for term, own in _shares(node, leaves) if leaf in own)
        else:
            nodes.append(node)
    return tuple(nodes)


def in_blocks(product: Product, unit: int) -> Product:
    """A product counted in blocks of `unit` elements: of a sum, each term by itself.

    Raises ReshardError where a block would hold elements of several leaves, whose every element stands by itself.
    """
    at = max((at for at, node in enumerate(product) if isinstance(node, Sum)), default=-1)
    if product[at + 1 :]:
        return (*product[: at + 1], derived(tuple(map(str, product[at + 1 :])), unit))
    node = product[at] if product else None
    if not isinstance(node, Sum):
        raise ReshardError(f"a dimension of 1 cannot be counted in blocks of {unit}")
    return (*product[:at], Sum(tuple(in_blocks(term, unit) for term in node.terms)))


def _dimension(product: Product) -> str:
    """One dimension as text: a factor."""
    return _node(product[0]) if len(product) == 1 else f"({_factors(product)})" if product else "1"


def _factors(product: Product) -> str:
    return " ".join(map(_node, product)) or "1"


def _node(node: str | Sum) -> str:
    if isinstance(node, Sum):
        return f"({' + '.join(map(_factors, node.terms))})"
    if block := block_of(node):
        return f"({' '.join(block[0])})/{block[1]}" if len(block[0]) > 1 else f"{block[0][0]}/{block[1]}"
    return node


def _shares(node: Sum, leaves: range) -> Iterator[tuple[Product, range]]:
    """The terms of a seam, each with the leaves that are its own."""
    first = leaves.start
    for term in node.terms:
        count = _count(term)
        yield term, range(first, first + count)
        first += count


def _count(product: Product) -> int:
    return sum(_count(term) for node in product if isinstance(node, Sum) for term in node.terms) or 1


def _extent(product: Product, leaves: range, size: Callable[[int, str], int]) -> int:
    extent = 1
    for node in product:
        if isinstance(node, Sum):
            extent *= sum(_extent(term, own, size) for term, own in _shares(node, leaves))
            continue
        sizes = {size(leaf, node) for leaf in leaves}
        if len(sizes) > 1:
            held = " and ".join(map(str, sorted(sizes)))
            raise ReshardError(
                f"axis {node} is shared in memory by tensors that hold {held} of it", "give each its own term"
            )
        extent *= sizes.pop()
    return extent


def _place(
    product: Product, leaves: range, offset: int, stride: int, size: Callable[[int, str], int], spans: list[Span]
) -> None:
    seam: tuple[Sum, int] | None = None
    for node in reversed(product):
        if isinstance(node, Sum):
            seam = (node, stride)
        else:
            for leaf in leaves:
                spans[leaf].strides[node] = stride
        stride *= _extent((node,), leaves, size)
    if seam is None:
        spans[leaves.start] = Span(offset, spans[leaves.start].strides)
        return
    node, step = seam
    for term, own in _shares(node, leaves):
        _place(term, own, offset, step, size, spans)
        offset += _extent(term, own, size) * step


# --- parsing ----------------------------------------------------------------------------------------------------------

LONGEST = 250  # characters of a pattern; tables in a manifest come from strangers
_TOKEN = re.compile(r"\s*([A-Za-z_][A-Za-z0-9_]*(?:@[a-z_][a-z0-9_]*)?|[0-9]+|[()+/])")


def parse_pattern(text: str, compounds: Mapping[str, Sequence[str]]) -> Pattern:
    """Parse a pattern, with compound axes (`heads = kv group`) written out.

    A factor followed by `/128` is stored per block of 128: it becomes one derived axis, named "kv group head_dim/128".
    Raises ReshardError: unbalanced parentheses, an unknown character, an axis used twice by one leaf, several seams in
    one product.
    """
    tokens = _tokens(text)
    dims: list[Product] = []
    while tokens:
        dims.append(_factor(tokens, text, compounds))
    flat: Product = tuple(node for dim in dims for node in dim)
    _one_seam(flat, text)
    axes = tuple(_paths(flat))
    for path in axes:
        doubled = sorted({axis for axis in path if path.count(axis) > 1})
        if doubled:
            raise ReshardError(f'pattern "{text}": axis {doubled[0]} occurs twice in one leaf')
    return Pattern(tuple(dims), axes)


def _tokens(text: str) -> list[str]:
    if len(text) > LONGEST:
        raise ReshardError(f'pattern "{text[:60]}…" of {len(text)} characters: at most {LONGEST} are read')
    tokens, at = [], 0
    while at < len(text.rstrip()):
        match = _TOKEN.match(text, at)
        if match is None:
            at += len(text[at:]) - len(text[at:].lstrip())
            raise ReshardError(f'pattern "{text}": unexpected character {text[at]!r} at position {at}')
        tokens.append(match[1])
        at = match.end()
    return tokens[::-1]  # a stack: the next token is the last element


def _factor(tokens: list[str], text: str, compounds: Mapping[str, Sequence[str]]) -> Product:
    token = tokens.pop()
    product: Product
    if token == "(":
        terms = [_product(tokens, text, compounds)]
        while tokens and tokens[-1] == "+":
            tokens.pop()
            terms.append(_product(tokens, text, compounds))
        if not tokens or tokens.pop() != ")":
            raise ReshardError(f'pattern "{text}": a parenthesis is not closed')
        product = terms[0] if len(terms) == 1 else (Sum(tuple(terms)),)
    elif token == "1":
        product = ()
    elif token[0].isalpha() or token[0] == "_":
        base, _, variant = token.partition("@")
        product = tuple(varied(axis, variant) for axis in compounds.get(base, (base,)))
    else:
        raise ReshardError(f'pattern "{text}": unexpected "{token}"')
    if tokens and tokens[-1] == "/":
        tokens.pop()
        unit = tokens.pop() if tokens else ""
        step = numeral(unit) or 0
        if step < 2 or any(isinstance(node, Sum) for node in product) or not product:
            raise ReshardError(f'pattern "{text}": "/" wants axes before it and a block size of at least 2 after it')
        product = (derived(tuple(str(node) for node in product), step),)
    return product


def _product(tokens: list[str], text: str, compounds: Mapping[str, Sequence[str]]) -> Product:
    product: list[str | Sum] = []
    start = len(tokens)
    while tokens and tokens[-1] not in ")+":
        product.extend(_factor(tokens, text, compounds))
    if len(tokens) == start:
        raise ReshardError(f'pattern "{text}": an empty term')
    return tuple(product)


def _one_seam(product: Product, text: str) -> None:
    seams = [node for node in product if isinstance(node, Sum)]
    if len(seams) > 1:
        raise ReshardError(
            f'pattern "{text}": several sums along one product', "cut the tensor into rows with one seam each"
        )
    for seam in seams:
        for term in seam.terms:
            _one_seam(term, text)


def _paths(product: Product) -> Iterator[tuple[str, ...]]:
    seam = next((at for at, node in enumerate(product) if isinstance(node, Sum)), None)
    if seam is None:
        yield tuple(str(node) for node in product)
        return
    node = product[seam]
    assert isinstance(node, Sum)
    before, after = product[:seam], product[seam + 1 :]
    for term in node.terms:
        for path in _paths(term):
            yield (*(str(axis) for axis in before), *path, *(str(axis) for axis in after))


# --- axes stored per block --------------------------------------------------------------------------------------------


def derived(axes: tuple[str, ...], unit: int) -> str:
    """The name of the axis that counts blocks of `unit` along `axes` taken row-major."""
    return f"{' '.join(axes)}/{unit}"


def block_of(axis: str) -> tuple[tuple[str, ...], int] | None:
    """The inverse of `derived`: the axes counted and the block size, or None for a plain axis."""
    base, slash, unit = axis.partition("/")
    return (tuple(base.split()), int(unit)) if slash else None


def bases(axes: Iterable[str]) -> set[str]:
    """Plain axes; of those that count blocks, the axes counted."""
    found: set[str] = set()
    for axis in axes:
        block = block_of(axis)
        found.update(block[0] if block else (axis,))
    return found


# --- variants ---------------------------------------------------------------------------------------------------------


def varied(name: str, variant: str) -> str:
    """The name of an axis or a logical tensor in layers of other sizes: head_dim@full."""
    return f"{name}@{variant}" if variant else name


def variant_of(name: str) -> str:
    """The inverse of `varied`: "full" of head_dim@full, "" of a plain name."""
    return name.partition("@")[2]


# --- names ------------------------------------------------------------------------------------------------------------

_HOLE = re.compile(r"\{([a-z_][a-z_0-9]*)(:local|:extra|//[1-9][0-9]{0,3}|%[1-9][0-9]{0,3})?\}")
_NUMBER = re.compile(r"(?<![^.])[0-9]+(?![^.])")  # a whole path segment


class Template(NamedTuple):
    """A stored name with holes for enumerated axes: `model.layers.{layer}.mlp.experts.{experts}.w1`."""

    text: str
    axes: tuple[str, ...]  # of the holes, left to right: one for each, several for a compound
    local: frozenset[str]  # axes counted from 0 inside the rank
    form: str  # the text as str.format takes it
    extra: bool = False  # layers are counted from 0 beyond the main ones, which are `base`
    base: int = 0
    compounds: tuple[tuple[str, tuple[str, ...]], ...] = ()  # holes that count several axes, row-major
    sizes: tuple[int, ...] = ()  # of `axes`, once they are known; only those of parts of compounds matter
    # axes that are counted in steps: `{layer//2}`, and inside one by `{layer%2}`, else the first
    steps: tuple[tuple[str, int], ...] = ()

    def name(self, point: Mapping[str, int]) -> str:
        """The stored name at a point of the enumerated axes."""
        if not self.axes:
            return self.text
        if self.base:
            point = {**point, "layer": point["layer"] - self.base}
        for axis, step in self.steps:
            point = {**point, f"{axis}//{step}": point[axis] // step, f"{axis}%{step}": point[axis] % step}
        return self.form.format_map({**point, **self._counted(point)} if self.compounds else point)

    def _counted(self, point: Mapping[str, int]) -> dict[str, int]:
        """Holes that count several axes, at a point of these."""
        sizes, found = dict(zip(self.axes, self.sizes, strict=True)), {}
        for hole, parts in self.compounds:
            number = 0
            for part in parts:
                number = number * sizes[part] + point[part]
            found[hole] = number
        return found

    def numbers(self, found: tuple[int, ...]) -> tuple[int, ...] | None:
        """The numbers of the axes where a name has those found in its holes; None where these are too few or too many,
        or nothing is known of a compound's parts."""
        if self.compounds:
            found = self._parted(found)
        elif self.steps:
            found = self._stepped(found)
        if len(found) != len(self.axes):
            return None
        return (
            tuple(n + self.base if axis == "layer" else n for axis, n in zip(self.axes, found, strict=True))
            if self.base
            else found
        )

    def _parted(self, found: tuple[int, ...]) -> tuple[int, ...]:
        """Numbers of holes as numbers of axes."""
        holes, compounds, sizes = (
            _HOLE.findall(self.text),
            dict(self.compounds),
            dict(zip(self.axes, self.sizes, strict=False)),
        )
        if len(found) != len(holes) or not sizes:
            return ()
        numbers: list[int] = []
        for (hole, _), number in zip(holes, found, strict=True):
            own: list[int] = []
            for part in reversed(compounds.get(hole, (hole,))[1:]):
                number, rest = divmod(number, max(sizes[part], 1))
                own.insert(0, rest)
            numbers += [number, *own]
        return tuple(numbers)

    def _stepped(self, found: tuple[int, ...]) -> tuple[int, ...]:
        """Numbers of steps, and inside them, as numbers of axes."""
        holes, steps = _HOLE.findall(self.text), dict(self.steps)
        numbers = dict.fromkeys(self.axes, 0)
        for (axis, word), number in zip(holes, found, strict=False):
            if word.startswith("%") and number >= steps[axis]:
                return ()
            numbers[axis] += number * (steps[axis] if word.startswith("//") else 1)
        return tuple(numbers.values()) if len(found) == len(holes) else ()

    def counts(self, axis: str, number: int) -> bool:
        """Whether there is a name for this number of an axis: there is none inside a step that only counts steps."""
        step = dict(self.steps).get(axis)
        return step is None or number % step == 0 or f"{{{axis}%{step}}}" in self.text

    @property
    def folded(self) -> str:
        return _HOLE.sub("{}", self.text)


def parse_template(text: str, compounds: Mapping[str, Sequence[str]] = MappingProxyType({})) -> Template:
    if not text.lstrip("~"):
        raise ReshardError(f'stored name "{text}": is empty')
    holes = list(_HOLE.finditer(text))
    rest = _HOLE.sub("", text)
    if "{" in rest or "}" in rest:
        raise ReshardError(
            f'stored name "{text}": a brace that is no placeholder',
            "write {axis}, {axis:local}, {layer:extra}, {axis//2} or {axis%2}",
        )
    own = tuple((hole[1], tuple(compounds[hole[1]])) for hole in holes if hole[1] in compounds and not hole[2])
    axes = tuple(axis for hole in holes for axis in dict(own).get(hole[1], (hole[1],)))
    steps = {hole[1]: int(hole[2].lstrip("/%")) for hole in holes if hole[2] and hole[2][0] in "/%"}
    for axis, step in steps.items():
        words = [hole[2] or "" for hole in holes if hole[1] == axis]
        if sorted(words) not in ([f"//{step}"], [f"%{step}", f"//{step}"]) or own:
            raise ReshardError(
                f'stored name "{text}": {axis} is not counted in steps',
                f"write {{{axis}//2}}, or that and {{{axis}%2}}",
            )
    axes = tuple(axis for at, axis in enumerate(axes) if axis not in steps or axes.index(axis) == at)
    if len(set(axes)) < len(axes):
        raise ReshardError(f'stored name "{text}": a placeholder occurs twice')
    extra = [hole[1] for hole in holes if hole[2] == ":extra"]
    if extra not in ([], ["layer"]):
        raise ReshardError(f'stored name "{text}": {extra[0]} cannot be extra', "only layers are: write {layer:extra}")
    local = frozenset(hole[1] for hole in holes if hole[2] == ":local")
    form = _HOLE.sub(lambda hole: hole[0] if hole[1] in steps else f"{{{hole[1]}}}", text)
    return Template(text, axes, local, form, bool(extra), compounds=own, steps=tuple(steps.items()))


def fold(name: str) -> tuple[str, tuple[int, ...]]:
    """`layers.3.experts.7.w1` → (`layers.{}.experts.{}.w1`, (3, 7)): whole numeric segments only, so `w1` stays."""
    numbers = _NUMBER.findall(name)
    if any(len(number) > 9 or (number[0] == "0" and number != "0") for number in numbers):
        return name, ()  # `007` would not come back from a 7
    return _NUMBER.sub("{}", name), tuple(map(int, numbers))
