"""The contract: which columns an inventory has, what they mean, and what values they may take.

It is a TensorFlow Metadata `Schema` in text form, so that other tools read it too; the meaning of a column is in its annotation tags:

    key           part of the ad's key (one or more columns; together unique in a month)
    image         name of the ad's creative, relative to the month's images folder; may be empty
    clicked       outcome of one impression, 0 or 1; or, for summed rows,
    clicks        and
    impressions   outcome of many impressions; an empty outcome or 0 impressions is an unlabelled row
    position      where the ad was shown; an input in training, held at `reference:N` (default 1) in scoring
    segment       sliced by in the gate and in reports, and carried into the score table; a feature as well
    categorical   an INT column whose numbers are names (BYTES columns always are)
    history       a column such as campaign or advertiser, of which what happened in earlier months is a feature as well
    mature_before `mature_before:N` on a BYTES column of dates, YYYY-MM-DD: a row whose date is not at least N days before the month's end
                  is too young, so it is scored, and neither trained on nor judged
    allow         a feature that stays one though it seems to tell the outcome (model/leakage.py)
    ignore        read and dropped

All other columns are features.

How far a column may drift from month to month, and scored rows from those trained on, is in its `drift_comparator` and `skew_comparator`:
`infinity_norm` for a categorical column (the biggest difference of a value's share), `jensen_shannon_divergence` for a number (in bits).
"""

import dataclasses
import functools
import hashlib
import json
import pathlib
from typing import TYPE_CHECKING, Any

from schemas.storage import read_text

if TYPE_CHECKING:
    import pyarrow as pa

DEFAULT = pathlib.Path(__file__).with_name("ads.pbtxt")
OUTCOMES = ("clicked", "clicks", "impressions")
TAGS = ("key", "image", *OUTCOMES, "position", "segment", "categorical", "history", "mature_before", "allow", "ignore")
# What Adstocrat itself adds to rows, beside all columns, and to scores, beside a contract's key and segment columns; none must collide.
ADDED_TO_ROWS = frozenset(("key", "creative", "image_status", "embedding", "month_number"))
RESERVED = ADDED_TO_ROWS | {
    "month",
    "p_click",
    "score_status",
    "evidence_key",
    "evidence_creative",
    "encoder_version",
    "model_version",
    "run_id",
}


class ContractError(ValueError):
    """A contract that cannot be used, with the column, what was expected and the fix."""


@dataclasses.dataclass(frozen=True)
class Column:
    """One column of the CSV.

    Attributes:
        name: its header.
        kind: `bytes` (UTF-8 text), `int` (64 bits) or `float` (64 bits).
        tags: its meaning, see the module's docstring.
        required: whether a row without a value is rejected.
        minimum, maximum: inclusive bounds of numbers; None is unbounded.
        reference: the position that scores are given at; only used with the tag `position`.
        mature_days: days before the month's end; only used with the tag `mature_before`.
        drift, skew: limits of its comparators; no part of what the column means.
    """

    name: str
    kind: str
    tags: frozenset[str] = frozenset()
    required: bool = False
    minimum: float | None = None
    maximum: float | None = None
    reference: float = 1.0
    mature_days: int = 0
    drift: float | None = None
    skew: float | None = None

    @property
    def arrow_type(self) -> "pa.DataType":
        import pyarrow as pa

        return {"bytes": pa.string(), "int": pa.int64(), "float": pa.float64()}[self.kind]

    @property
    def categorical(self) -> bool:
        return self.kind == "bytes" or "categorical" in self.tags


class _Tagged:
    """An attribute of a contract: its column that has the attribute's name as a tag, None where no column has."""

    def __set_name__(self, owner: type, name: str) -> None:
        self._tag = name

    def __get__(self, contract: "Contract", owner: type) -> Column | None:
        return next((column for column in contract.columns if self._tag in column.tags), None)


@dataclasses.dataclass(frozen=True)
class Contract:
    """The columns of an inventory, in the order of the contract's file; checked when made.

    Raises:
        ContractError: a column has no usable type or meaning, or they do not make a whole.
    """

    columns: tuple[Column, ...]

    image = _Tagged()
    clicked = _Tagged()
    clicks = _Tagged()
    impressions = _Tagged()
    position = _Tagged()
    mature_before = _Tagged()

    def __post_init__(self) -> None:
        names = [column.name for column in self.columns]
        for name in {name for name in names if names.count(name) > 1}:
            raise ContractError(f"contract column {name!r} is there twice; keep one")
        for column in self.columns:
            for tag in column.tags - set(TAGS):
                raise ContractError(f"contract column {column.name!r} has the tag {tag!r}; expected one of {', '.join(TAGS)}")
            if "ignore" in column.tags and (roles := column.tags - {"ignore", "categorical"}):
                raise ContractError(f"contract column {column.name!r} is tagged 'ignore' and {', '.join(sorted(roles))}; keep one of them")
            if column.kind == "bytes" and (column.minimum, column.maximum) != (None, None):
                raise ContractError(f"contract column {column.name!r} is of type BYTES and has bounds; make it INT or FLOAT, or drop them")
        for tag in ("image", *OUTCOMES, "position", "mature_before"):
            tagged = [column.name for column in self._tagged(tag)]
            if len(tagged) > 1:
                raise ContractError(f"contract columns {', '.join(tagged)} are all tagged {tag!r}; expected one at most")
        if not self.key:
            raise ContractError("no contract column is tagged 'key'; tag the column or columns that together name an ad")
        if bool(self.clicks) != bool(self.impressions) or (self.clicked and self.clicks):
            raise ContractError("the outcome is either one column tagged 'clicked', or one tagged 'clicks' and one tagged 'impressions'")
        for column in self.outcomes:
            if len(column.tags) > 1:
                tags = " and ".join(sorted(column.tags))
                raise ContractError(f"contract column {column.name!r} is tagged {tags}; expected an outcome to be that alone")
            if column.kind != "int":
                raise ContractError(
                    f"contract column {column.name!r} is an outcome of type {column.kind!r}; expected INT, so whole numbers in the export "
                    "(3, not 3.0)"
                )
        if self.position and self.position.kind == "bytes":
            raise ContractError(f"contract column {self.position.name!r} is a position of type BYTES; expected INT or FLOAT")
        for text, what in ((self.mature_before, "a date"), (self.image, "an image")):
            if text and text.kind != "bytes":
                raise ContractError(f"contract column {text.name!r} is {what} of type {text.kind!r}; expected BYTES")
        for column in self.kept:
            reserved = RESERVED if column in self.carried else ADDED_TO_ROWS
            if column.name.lower() in reserved:
                raise ContractError(
                    f"contract column {column.name!r} has a reserved name ({', '.join(sorted(reserved))}); rename it in the export"
                )

    def _tagged(self, tag: str) -> tuple[Column, ...]:
        return tuple(column for column in self.columns if tag in column.tags)

    @property
    def key(self) -> tuple[Column, ...]:
        return self._tagged("key")

    @property
    def outcomes(self) -> tuple[Column, ...]:
        return tuple(column for column in (self.clicked, self.clicks, self.impressions) if column)

    @property
    def segments(self) -> tuple[Column, ...]:
        return self._tagged("segment")

    @property
    def kept(self) -> tuple[Column, ...]:
        """The columns that ingest keeps."""
        return tuple(column for column in self.columns if "ignore" not in column.tags)

    @property
    def features(self) -> tuple[Column, ...]:
        """What the ranker sees beside the image and the position: never an outcome, never the key."""
        taken = {"key", "image", "position", "mature_before", "ignore", *OUTCOMES}
        return tuple(column for column in self.columns if not column.tags & taken)

    @property
    def categoricals(self) -> tuple[Column, ...]:
        return tuple(column for column in self.features if column.categorical)

    @property
    def numerics(self) -> tuple[Column, ...]:
        return tuple(column for column in self.features if not column.categorical)

    @property
    def carried(self) -> tuple[Column, ...]:
        """Key and segment columns, in the contract's order: what the score table shows of a row beside its score."""
        return tuple(column for column in self.kept if column.tags & {"key", "segment"})

    @functools.cached_property
    def fingerprint(self) -> str:
        """Digest of everything that columns mean; comments and layout of the file do not count."""
        plain = [{**dataclasses.asdict(column), "tags": sorted(column.tags)} for column in self.columns]
        for column in plain:
            del column["drift"], column["skew"]
            # Contracts that do not use it mean what they meant before there was such a tag.
            if not column["mature_days"]:
                del column["mature_days"]
        return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()[:16]


def load(path: pathlib.Path | str) -> Contract:
    """Read a contract file, at a path or at gs://bucket/path.

    Raises:
        ContractError: no such file, not a TensorFlow Metadata Schema in text form, or a column that cannot be used.
        ValueError, OSError: as `read_text`.
    """
    try:
        text = read_text(str(path))
    except FileNotFoundError:
        raise ContractError(f"contract {str(path)!r} does not exist; draft one with `adstocrat infer-contract FILES`") from None
    except UnicodeDecodeError as error:
        raise ContractError(f"contract {str(path)!r} is not UTF-8 ({error}); save it as UTF-8") from None
    return parse(text, str(path))


def parse(text: str, name: str = "contract") -> Contract:
    """A contract from its text form; `name` is what errors call it."""
    from google.protobuf import text_format
    from tensorflow_metadata.proto.v0 import schema_pb2

    try:
        schema = text_format.Parse(text, schema_pb2.Schema())
    except text_format.ParseError as error:
        raise ContractError(f"{name} is not a TensorFlow Metadata Schema in text form: {error}") from None
    return Contract(tuple(_column(feature) for feature in schema.feature))


def dumps(contract: Contract) -> str:
    """The contract in text form, as `load` reads it."""
    from google.protobuf import text_format
    from tensorflow_metadata.proto.v0 import schema_pb2

    schema = schema_pb2.Schema()
    for column in contract.columns:
        feature = schema.feature.add(name=column.name, type=schema_pb2.FeatureType.Value(column.kind.upper()))
        if column.required:
            feature.presence.min_fraction = 1.0
        domain = {"int": feature.int_domain, "float": feature.float_domain}.get(column.kind)
        for bound, value in (("min", column.minimum), ("max", column.maximum)):
            if domain is not None and value is not None:
                setattr(domain, bound, int(value) if column.kind == "int" else value)
        feature.annotation.tag.extend(tag for tag in TAGS if tag in column.tags and tag != "mature_before")
        if "mature_before" in column.tags:
            feature.annotation.tag.append(f"mature_before:{column.mature_days}")
        if "position" in column.tags:
            feature.annotation.tag.append(f"reference:{column.reference!r}")
        for comparator, limit in ((feature.drift_comparator, column.drift), (feature.skew_comparator, column.skew)):
            if limit is not None:
                getattr(comparator, _norm(column.categorical)).threshold = limit
    return text_format.MessageToString(schema)


def _column(feature: Any) -> Column:
    from tensorflow_metadata.proto.v0 import schema_pb2

    kind = schema_pb2.FeatureType.Name(feature.type).lower()
    if kind not in ("bytes", "int", "float"):
        raise ContractError(f"contract column {feature.name!r} has type {kind.upper()}; expected BYTES, INT or FLOAT")
    tags = set(feature.annotation.tag)
    references = {tag for tag in tags if tag.startswith("reference:")}
    domain = {"int_domain": feature.int_domain, "float_domain": feature.float_domain}.get(feature.WhichOneof("domain_info") or "")
    bounds = {} if domain is None else {f.name: value for f, value in domain.ListFields()}
    try:
        reference = float(min(references).partition(":")[2]) if references else 1.0
    except ValueError:
        raise ContractError(f"contract column {feature.name!r} has the tag {min(references)!r}; expected reference:NUMBER") from None
    young = {tag for tag in tags if tag.startswith("mature_before")}
    if young and not (days := min(young).partition(":")[2]).isdigit():
        raise ContractError(f"contract column {feature.name!r} has the tag {min(young)!r}; expected mature_before:DAYS")
    made = Column(
        name=feature.name,
        kind=kind,
        tags=frozenset(tags - references - young | ({"mature_before"} if young else set())),
        required="key" in tags or feature.presence.min_fraction >= 1.0,
        minimum=bounds.get("min"),
        maximum=bounds.get("max"),
        reference=reference,
        mature_days=int(days) if young else 0,
    )
    drift, skew = (_limit(feature, f"{name}_comparator", made.categorical) for name in ("drift", "skew"))
    return dataclasses.replace(made, drift=drift, skew=skew)


def _norm(categorical: bool) -> str:
    return "infinity_norm" if categorical else "jensen_shannon_divergence"


def _limit(feature: Any, name: str, categorical: bool) -> float | None:
    """The limit of a column's comparator; None without one."""
    comparator, norm = getattr(feature, name), _norm(categorical)
    set_ = [field.name for field, _ in comparator.ListFields()]
    if set_ and (set_ != [norm] or not 0 < getattr(comparator, norm).threshold <= 1):
        what = "categorical" if categorical else "a number"
        raise ContractError(
            f"contract column {feature.name!r} is {what}, and its {name} is {str(comparator).strip()!r}; expected {norm} with a threshold "
            "above 0 and up to 1"
        )
    return getattr(comparator, norm).threshold if set_ else None
