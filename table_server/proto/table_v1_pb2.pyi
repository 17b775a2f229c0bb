from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class DType(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    DTYPE_UNSPECIFIED: _ClassVar[DType]
    FLOAT32: _ClassVar[DType]
    FLOAT16: _ClassVar[DType]
    BFLOAT16: _ClassVar[DType]
    FLOAT8_E4M3FN: _ClassVar[DType]
    FLOAT8_E5M2: _ClassVar[DType]
    UINT8: _ClassVar[DType]
    UINT16: _ClassVar[DType]
    INT32: _ClassVar[DType]
    INT64: _ClassVar[DType]

class Role(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ROLE_UNSPECIFIED: _ClassVar[Role]
    PRIMARY: _ClassVar[Role]
    REPLICA: _ClassVar[Role]
DTYPE_UNSPECIFIED: DType
FLOAT32: DType
FLOAT16: DType
BFLOAT16: DType
FLOAT8_E4M3FN: DType
FLOAT8_E5M2: DType
UINT8: DType
UINT16: DType
INT32: DType
INT64: DType
ROLE_UNSPECIFIED: Role
PRIMARY: Role
REPLICA: Role

class Tensor(_message.Message):
    __slots__ = ("dtype", "shape", "data", "crc32c", "row_scales")
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    CRC32C_FIELD_NUMBER: _ClassVar[int]
    ROW_SCALES_FIELD_NUMBER: _ClassVar[int]
    dtype: DType
    shape: _containers.RepeatedScalarFieldContainer[int]
    data: bytes
    crc32c: int
    row_scales: bytes
    def __init__(self, dtype: _Optional[_Union[DType, str]] = ..., shape: _Optional[_Iterable[int]] = ..., data: _Optional[bytes] = ..., crc32c: _Optional[int] = ..., row_scales: _Optional[bytes] = ...) -> None: ...

class Region(_message.Message):
    __slots__ = ("row_begin", "row_end", "column_begin", "column_end")
    ROW_BEGIN_FIELD_NUMBER: _ClassVar[int]
    ROW_END_FIELD_NUMBER: _ClassVar[int]
    COLUMN_BEGIN_FIELD_NUMBER: _ClassVar[int]
    COLUMN_END_FIELD_NUMBER: _ClassVar[int]
    row_begin: int
    row_end: int
    column_begin: int
    column_end: int
    def __init__(self, row_begin: _Optional[int] = ..., row_end: _Optional[int] = ..., column_begin: _Optional[int] = ..., column_end: _Optional[int] = ...) -> None: ...

class TableSpec(_message.Message):
    __slots__ = ("name", "num_rows", "row_dim", "dtype")
    NAME_FIELD_NUMBER: _ClassVar[int]
    NUM_ROWS_FIELD_NUMBER: _ClassVar[int]
    ROW_DIM_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    name: str
    num_rows: int
    row_dim: int
    dtype: DType
    def __init__(self, name: _Optional[str] = ..., num_rows: _Optional[int] = ..., row_dim: _Optional[int] = ..., dtype: _Optional[_Union[DType, str]] = ...) -> None: ...

class RowOptimizer(_message.Message):
    __slots__ = ("rule", "lr", "weight_decay", "seed", "eps", "beta1", "beta2", "state_dtype")
    class Rule(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        RULE_UNSPECIFIED: _ClassVar[RowOptimizer.Rule]
        SGD: _ClassVar[RowOptimizer.Rule]
        ROWWISE_ADAGRAD: _ClassVar[RowOptimizer.Rule]
        ADAM: _ClassVar[RowOptimizer.Rule]
    RULE_UNSPECIFIED: RowOptimizer.Rule
    SGD: RowOptimizer.Rule
    ROWWISE_ADAGRAD: RowOptimizer.Rule
    ADAM: RowOptimizer.Rule
    RULE_FIELD_NUMBER: _ClassVar[int]
    LR_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_DECAY_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    EPS_FIELD_NUMBER: _ClassVar[int]
    BETA1_FIELD_NUMBER: _ClassVar[int]
    BETA2_FIELD_NUMBER: _ClassVar[int]
    STATE_DTYPE_FIELD_NUMBER: _ClassVar[int]
    rule: RowOptimizer.Rule
    lr: float
    weight_decay: float
    seed: int
    eps: float
    beta1: float
    beta2: float
    state_dtype: DType
    def __init__(self, rule: _Optional[_Union[RowOptimizer.Rule, str]] = ..., lr: _Optional[float] = ..., weight_decay: _Optional[float] = ..., seed: _Optional[int] = ..., eps: _Optional[float] = ..., beta1: _Optional[float] = ..., beta2: _Optional[float] = ..., state_dtype: _Optional[_Union[DType, str]] = ...) -> None: ...

class Shard(_message.Message):
    __slots__ = ("table", "region", "optimizer", "std", "seed")
    TABLE_FIELD_NUMBER: _ClassVar[int]
    REGION_FIELD_NUMBER: _ClassVar[int]
    OPTIMIZER_FIELD_NUMBER: _ClassVar[int]
    STD_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    table: TableSpec
    region: Region
    optimizer: RowOptimizer
    std: float
    seed: int
    def __init__(self, table: _Optional[_Union[TableSpec, _Mapping]] = ..., region: _Optional[_Union[Region, _Mapping]] = ..., optimizer: _Optional[_Union[RowOptimizer, _Mapping]] = ..., std: _Optional[float] = ..., seed: _Optional[int] = ...) -> None: ...

class DescribeRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class DescribeReply(_message.Message):
    __slots__ = ("server_id", "epoch", "version", "shards", "is_draining", "role", "peer", "is_in_sync")
    SERVER_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    SHARDS_FIELD_NUMBER: _ClassVar[int]
    IS_DRAINING_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    PEER_FIELD_NUMBER: _ClassVar[int]
    IS_IN_SYNC_FIELD_NUMBER: _ClassVar[int]
    server_id: str
    epoch: int
    version: str
    shards: _containers.RepeatedCompositeFieldContainer[ShardStatus]
    is_draining: bool
    role: Role
    peer: str
    is_in_sync: bool
    def __init__(self, server_id: _Optional[str] = ..., epoch: _Optional[int] = ..., version: _Optional[str] = ..., shards: _Optional[_Iterable[_Union[ShardStatus, _Mapping]]] = ..., is_draining: _Optional[bool] = ..., role: _Optional[_Union[Role, str]] = ..., peer: _Optional[str] = ..., is_in_sync: _Optional[bool] = ...) -> None: ...

class ShardStatus(_message.Message):
    __slots__ = ("shard", "version", "num_bytes")
    SHARD_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    NUM_BYTES_FIELD_NUMBER: _ClassVar[int]
    shard: Shard
    version: int
    num_bytes: int
    def __init__(self, shard: _Optional[_Union[Shard, _Mapping]] = ..., version: _Optional[int] = ..., num_bytes: _Optional[int] = ...) -> None: ...

class CreateRequest(_message.Message):
    __slots__ = ("shard",)
    SHARD_FIELD_NUMBER: _ClassVar[int]
    shard: Shard
    def __init__(self, shard: _Optional[_Union[Shard, _Mapping]] = ...) -> None: ...

class CreateReply(_message.Message):
    __slots__ = ("status", "was_there")
    STATUS_FIELD_NUMBER: _ClassVar[int]
    WAS_THERE_FIELD_NUMBER: _ClassVar[int]
    status: ShardStatus
    was_there: bool
    def __init__(self, status: _Optional[_Union[ShardStatus, _Mapping]] = ..., was_there: _Optional[bool] = ...) -> None: ...

class TrainRequest(_message.Message):
    __slots__ = ("table", "optimizer")
    TABLE_FIELD_NUMBER: _ClassVar[int]
    OPTIMIZER_FIELD_NUMBER: _ClassVar[int]
    table: str
    optimizer: RowOptimizer
    def __init__(self, table: _Optional[str] = ..., optimizer: _Optional[_Union[RowOptimizer, _Mapping]] = ...) -> None: ...

class TrainReply(_message.Message):
    __slots__ = ("status",)
    STATUS_FIELD_NUMBER: _ClassVar[int]
    status: ShardStatus
    def __init__(self, status: _Optional[_Union[ShardStatus, _Mapping]] = ...) -> None: ...

class DropRequest(_message.Message):
    __slots__ = ("table",)
    TABLE_FIELD_NUMBER: _ClassVar[int]
    table: str
    def __init__(self, table: _Optional[str] = ...) -> None: ...

class DropReply(_message.Message):
    __slots__ = ("was_there",)
    WAS_THERE_FIELD_NUMBER: _ClassVar[int]
    was_there: bool
    def __init__(self, was_there: _Optional[bool] = ...) -> None: ...

class JoinRequest(_message.Message):
    __slots__ = ("client", "num_clients", "session", "seen_epoch")
    CLIENT_FIELD_NUMBER: _ClassVar[int]
    NUM_CLIENTS_FIELD_NUMBER: _ClassVar[int]
    SESSION_FIELD_NUMBER: _ClassVar[int]
    SEEN_EPOCH_FIELD_NUMBER: _ClassVar[int]
    client: int
    num_clients: int
    session: int
    seen_epoch: int
    def __init__(self, client: _Optional[int] = ..., num_clients: _Optional[int] = ..., session: _Optional[int] = ..., seen_epoch: _Optional[int] = ...) -> None: ...

class JoinReply(_message.Message):
    __slots__ = ("epoch", "steps", "is_asynchronous", "rows_since", "held_steps")
    class StepsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    class HeldStepsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    STEPS_FIELD_NUMBER: _ClassVar[int]
    IS_ASYNCHRONOUS_FIELD_NUMBER: _ClassVar[int]
    ROWS_SINCE_FIELD_NUMBER: _ClassVar[int]
    HELD_STEPS_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    steps: _containers.ScalarMap[str, int]
    is_asynchronous: bool
    rows_since: int
    held_steps: _containers.ScalarMap[str, int]
    def __init__(self, epoch: _Optional[int] = ..., steps: _Optional[_Mapping[str, int]] = ..., is_asynchronous: _Optional[bool] = ..., rows_since: _Optional[int] = ..., held_steps: _Optional[_Mapping[str, int]] = ...) -> None: ...

class Lookups(_message.Message):
    __slots__ = ("row_ids", "scores", "tokens", "num_tokens")
    ROW_IDS_FIELD_NUMBER: _ClassVar[int]
    SCORES_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    NUM_TOKENS_FIELD_NUMBER: _ClassVar[int]
    row_ids: Tensor
    scores: Tensor
    tokens: Tensor
    num_tokens: int
    def __init__(self, row_ids: _Optional[_Union[Tensor, _Mapping]] = ..., scores: _Optional[_Union[Tensor, _Mapping]] = ..., tokens: _Optional[_Union[Tensor, _Mapping]] = ..., num_tokens: _Optional[int] = ...) -> None: ...

class LookupRequest(_message.Message):
    __slots__ = ("lookups", "table", "code_stride", "first_slot", "reply_dtype", "min_version")
    LOOKUPS_FIELD_NUMBER: _ClassVar[int]
    TABLE_FIELD_NUMBER: _ClassVar[int]
    CODE_STRIDE_FIELD_NUMBER: _ClassVar[int]
    FIRST_SLOT_FIELD_NUMBER: _ClassVar[int]
    REPLY_DTYPE_FIELD_NUMBER: _ClassVar[int]
    MIN_VERSION_FIELD_NUMBER: _ClassVar[int]
    lookups: Lookups
    table: str
    code_stride: int
    first_slot: int
    reply_dtype: DType
    min_version: int
    def __init__(self, lookups: _Optional[_Union[Lookups, _Mapping]] = ..., table: _Optional[str] = ..., code_stride: _Optional[int] = ..., first_slot: _Optional[int] = ..., reply_dtype: _Optional[_Union[DType, str]] = ..., min_version: _Optional[int] = ...) -> None: ...

class LookupReply(_message.Message):
    __slots__ = ("sums", "version")
    SUMS_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    sums: Tensor
    version: int
    def __init__(self, sums: _Optional[_Union[Tensor, _Mapping]] = ..., version: _Optional[int] = ...) -> None: ...

class GatherRequest(_message.Message):
    __slots__ = ("table", "row_ids", "state", "min_version")
    TABLE_FIELD_NUMBER: _ClassVar[int]
    ROW_IDS_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    MIN_VERSION_FIELD_NUMBER: _ClassVar[int]
    table: str
    row_ids: Tensor
    state: str
    min_version: int
    def __init__(self, table: _Optional[str] = ..., row_ids: _Optional[_Union[Tensor, _Mapping]] = ..., state: _Optional[str] = ..., min_version: _Optional[int] = ...) -> None: ...

class Rows(_message.Message):
    __slots__ = ("values", "version")
    VALUES_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    values: Tensor
    version: int
    def __init__(self, values: _Optional[_Union[Tensor, _Mapping]] = ..., version: _Optional[int] = ...) -> None: ...

class PushRequest(_message.Message):
    __slots__ = ("lookups", "grad_output", "row_ids", "row_gradients", "sequence", "is_last", "table", "client", "session", "epoch", "step", "lr", "code_stride", "first_slot", "is_frozen")
    LOOKUPS_FIELD_NUMBER: _ClassVar[int]
    GRAD_OUTPUT_FIELD_NUMBER: _ClassVar[int]
    ROW_IDS_FIELD_NUMBER: _ClassVar[int]
    ROW_GRADIENTS_FIELD_NUMBER: _ClassVar[int]
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    IS_LAST_FIELD_NUMBER: _ClassVar[int]
    TABLE_FIELD_NUMBER: _ClassVar[int]
    CLIENT_FIELD_NUMBER: _ClassVar[int]
    SESSION_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    LR_FIELD_NUMBER: _ClassVar[int]
    CODE_STRIDE_FIELD_NUMBER: _ClassVar[int]
    FIRST_SLOT_FIELD_NUMBER: _ClassVar[int]
    IS_FROZEN_FIELD_NUMBER: _ClassVar[int]
    lookups: Lookups
    grad_output: Tensor
    row_ids: Tensor
    row_gradients: Tensor
    sequence: int
    is_last: bool
    table: str
    client: int
    session: int
    epoch: int
    step: int
    lr: float
    code_stride: int
    first_slot: int
    is_frozen: bool
    def __init__(self, lookups: _Optional[_Union[Lookups, _Mapping]] = ..., grad_output: _Optional[_Union[Tensor, _Mapping]] = ..., row_ids: _Optional[_Union[Tensor, _Mapping]] = ..., row_gradients: _Optional[_Union[Tensor, _Mapping]] = ..., sequence: _Optional[int] = ..., is_last: _Optional[bool] = ..., table: _Optional[str] = ..., client: _Optional[int] = ..., session: _Optional[int] = ..., epoch: _Optional[int] = ..., step: _Optional[int] = ..., lr: _Optional[float] = ..., code_stride: _Optional[int] = ..., first_slot: _Optional[int] = ..., is_frozen: _Optional[bool] = ...) -> None: ...

class PushReply(_message.Message):
    __slots__ = ("score_gradients", "acknowledged")
    SCORE_GRADIENTS_FIELD_NUMBER: _ClassVar[int]
    ACKNOWLEDGED_FIELD_NUMBER: _ClassVar[int]
    score_gradients: Tensor
    acknowledged: Acknowledged
    def __init__(self, score_gradients: _Optional[_Union[Tensor, _Mapping]] = ..., acknowledged: _Optional[_Union[Acknowledged, _Mapping]] = ...) -> None: ...

class Acknowledged(_message.Message):
    __slots__ = ("step", "was_known")
    STEP_FIELD_NUMBER: _ClassVar[int]
    WAS_KNOWN_FIELD_NUMBER: _ClassVar[int]
    step: int
    was_known: bool
    def __init__(self, step: _Optional[int] = ..., was_known: _Optional[bool] = ...) -> None: ...

class StepRequest(_message.Message):
    __slots__ = ("table", "client", "session", "epoch", "step", "lr")
    TABLE_FIELD_NUMBER: _ClassVar[int]
    CLIENT_FIELD_NUMBER: _ClassVar[int]
    SESSION_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    LR_FIELD_NUMBER: _ClassVar[int]
    table: str
    client: int
    session: int
    epoch: int
    step: int
    lr: float
    def __init__(self, table: _Optional[str] = ..., client: _Optional[int] = ..., session: _Optional[int] = ..., epoch: _Optional[int] = ..., step: _Optional[int] = ..., lr: _Optional[float] = ...) -> None: ...

class StepReply(_message.Message):
    __slots__ = ("was_known",)
    WAS_KNOWN_FIELD_NUMBER: _ClassVar[int]
    was_known: bool
    def __init__(self, was_known: _Optional[bool] = ...) -> None: ...

class BarrierRequest(_message.Message):
    __slots__ = ("table", "version")
    TABLE_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    table: str
    version: int
    def __init__(self, table: _Optional[str] = ..., version: _Optional[int] = ...) -> None: ...

class BarrierReply(_message.Message):
    __slots__ = ("version",)
    VERSION_FIELD_NUMBER: _ClassVar[int]
    version: int
    def __init__(self, version: _Optional[int] = ...) -> None: ...

class WriteRequest(_message.Message):
    __slots__ = ("values", "row_ids", "table", "state", "version")
    VALUES_FIELD_NUMBER: _ClassVar[int]
    ROW_IDS_FIELD_NUMBER: _ClassVar[int]
    TABLE_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    values: Tensor
    row_ids: Tensor
    table: str
    state: str
    version: int
    def __init__(self, values: _Optional[_Union[Tensor, _Mapping]] = ..., row_ids: _Optional[_Union[Tensor, _Mapping]] = ..., table: _Optional[str] = ..., state: _Optional[str] = ..., version: _Optional[int] = ...) -> None: ...

class WriteReply(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class SaveRequest(_message.Message):
    __slots__ = ("directory", "step", "rank", "world_size", "meeting")
    DIRECTORY_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    WORLD_SIZE_FIELD_NUMBER: _ClassVar[int]
    MEETING_FIELD_NUMBER: _ClassVar[int]
    directory: str
    step: int
    rank: int
    world_size: int
    meeting: str
    def __init__(self, directory: _Optional[str] = ..., step: _Optional[int] = ..., rank: _Optional[int] = ..., world_size: _Optional[int] = ..., meeting: _Optional[str] = ...) -> None: ...

class SaveReply(_message.Message):
    __slots__ = ("step", "written_bytes")
    STEP_FIELD_NUMBER: _ClassVar[int]
    WRITTEN_BYTES_FIELD_NUMBER: _ClassVar[int]
    step: int
    written_bytes: int
    def __init__(self, step: _Optional[int] = ..., written_bytes: _Optional[int] = ...) -> None: ...

class LoadRequest(_message.Message):
    __slots__ = ("directory", "step")
    DIRECTORY_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    directory: str
    step: int
    def __init__(self, directory: _Optional[str] = ..., step: _Optional[int] = ...) -> None: ...

class LoadReply(_message.Message):
    __slots__ = ("step", "epoch")
    STEP_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    step: int
    epoch: int
    def __init__(self, step: _Optional[int] = ..., epoch: _Optional[int] = ...) -> None: ...

class StatsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class StatsReply(_message.Message):
    __slots__ = ("counters", "row_hits")
    class CountersEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    class RowHitsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    COUNTERS_FIELD_NUMBER: _ClassVar[int]
    ROW_HITS_FIELD_NUMBER: _ClassVar[int]
    counters: _containers.ScalarMap[str, float]
    row_hits: _containers.ScalarMap[str, int]
    def __init__(self, counters: _Optional[_Mapping[str, float]] = ..., row_hits: _Optional[_Mapping[str, int]] = ...) -> None: ...

class PromoteRequest(_message.Message):
    __slots__ = ("seen_epoch",)
    SEEN_EPOCH_FIELD_NUMBER: _ClassVar[int]
    seen_epoch: int
    def __init__(self, seen_epoch: _Optional[int] = ...) -> None: ...

class PromoteReply(_message.Message):
    __slots__ = ("epoch",)
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    def __init__(self, epoch: _Optional[int] = ...) -> None: ...

class ReplicateRequest(_message.Message):
    __slots__ = ("number", "hello", "shards", "copy", "push", "write", "settled")
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    HELLO_FIELD_NUMBER: _ClassVar[int]
    SHARDS_FIELD_NUMBER: _ClassVar[int]
    COPY_FIELD_NUMBER: _ClassVar[int]
    PUSH_FIELD_NUMBER: _ClassVar[int]
    WRITE_FIELD_NUMBER: _ClassVar[int]
    SETTLED_FIELD_NUMBER: _ClassVar[int]
    number: int
    hello: Hello
    shards: ShardList
    copy: ShardCopy
    push: LoggedPush
    write: AppliedWrite
    settled: Settled
    def __init__(self, number: _Optional[int] = ..., hello: _Optional[_Union[Hello, _Mapping]] = ..., shards: _Optional[_Union[ShardList, _Mapping]] = ..., copy: _Optional[_Union[ShardCopy, _Mapping]] = ..., push: _Optional[_Union[LoggedPush, _Mapping]] = ..., write: _Optional[_Union[AppliedWrite, _Mapping]] = ..., settled: _Optional[_Union[Settled, _Mapping]] = ...) -> None: ...

class ReplicateReply(_message.Message):
    __slots__ = ("number", "holding")
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    HOLDING_FIELD_NUMBER: _ClassVar[int]
    number: int
    holding: Holding
    def __init__(self, number: _Optional[int] = ..., holding: _Optional[_Union[Holding, _Mapping]] = ...) -> None: ...

class Hello(_message.Message):
    __slots__ = ("epoch", "server_id")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    SERVER_ID_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    server_id: str
    def __init__(self, epoch: _Optional[int] = ..., server_id: _Optional[str] = ...) -> None: ...

class Holding(_message.Message):
    __slots__ = ("epoch", "server_id", "shards")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    SERVER_ID_FIELD_NUMBER: _ClassVar[int]
    SHARDS_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    server_id: str
    shards: _containers.RepeatedCompositeFieldContainer[HeldShard]
    def __init__(self, epoch: _Optional[int] = ..., server_id: _Optional[str] = ..., shards: _Optional[_Iterable[_Union[HeldShard, _Mapping]]] = ...) -> None: ...

class HeldShard(_message.Message):
    __slots__ = ("history", "version", "edit")
    HISTORY_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    EDIT_FIELD_NUMBER: _ClassVar[int]
    history: str
    version: int
    edit: str
    def __init__(self, history: _Optional[str] = ..., version: _Optional[int] = ..., edit: _Optional[str] = ...) -> None: ...

class ShardList(_message.Message):
    __slots__ = ("entries", "num_clients")
    class Source(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        SOURCE_UNSPECIFIED: _ClassVar[ShardList.Source]
        KEPT: _ClassVar[ShardList.Source]
        DRAWN: _ClassVar[ShardList.Source]
        COPIED: _ClassVar[ShardList.Source]
    SOURCE_UNSPECIFIED: ShardList.Source
    KEPT: ShardList.Source
    DRAWN: ShardList.Source
    COPIED: ShardList.Source
    class Entry(_message.Message):
        __slots__ = ("shard", "held", "source")
        SHARD_FIELD_NUMBER: _ClassVar[int]
        HELD_FIELD_NUMBER: _ClassVar[int]
        SOURCE_FIELD_NUMBER: _ClassVar[int]
        shard: Shard
        held: HeldShard
        source: ShardList.Source
        def __init__(self, shard: _Optional[_Union[Shard, _Mapping]] = ..., held: _Optional[_Union[HeldShard, _Mapping]] = ..., source: _Optional[_Union[ShardList.Source, str]] = ...) -> None: ...
    ENTRIES_FIELD_NUMBER: _ClassVar[int]
    NUM_CLIENTS_FIELD_NUMBER: _ClassVar[int]
    entries: _containers.RepeatedCompositeFieldContainer[ShardList.Entry]
    num_clients: int
    def __init__(self, entries: _Optional[_Iterable[_Union[ShardList.Entry, _Mapping]]] = ..., num_clients: _Optional[int] = ...) -> None: ...

class ShardCopy(_message.Message):
    __slots__ = ("history", "rows", "answer", "is_last", "state")
    HISTORY_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    ANSWER_FIELD_NUMBER: _ClassVar[int]
    IS_LAST_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    history: str
    rows: Rows
    answer: KeptAnswer
    is_last: bool
    state: str
    def __init__(self, history: _Optional[str] = ..., rows: _Optional[_Union[Rows, _Mapping]] = ..., answer: _Optional[_Union[KeptAnswer, _Mapping]] = ..., is_last: _Optional[bool] = ..., state: _Optional[str] = ...) -> None: ...

class KeptAnswer(_message.Message):
    __slots__ = ("client", "step", "version", "score_gradients")
    CLIENT_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    SCORE_GRADIENTS_FIELD_NUMBER: _ClassVar[int]
    client: int
    step: int
    version: int
    score_gradients: Tensor
    def __init__(self, client: _Optional[int] = ..., step: _Optional[int] = ..., version: _Optional[int] = ..., score_gradients: _Optional[_Union[Tensor, _Mapping]] = ...) -> None: ...

class LoggedPush(_message.Message):
    __slots__ = ("history", "version", "message", "is_last")
    HISTORY_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    IS_LAST_FIELD_NUMBER: _ClassVar[int]
    history: str
    version: int
    message: bytes
    is_last: bool
    def __init__(self, history: _Optional[str] = ..., version: _Optional[int] = ..., message: _Optional[bytes] = ..., is_last: _Optional[bool] = ...) -> None: ...

class AppliedWrite(_message.Message):
    __slots__ = ("history", "edit", "at", "request")
    HISTORY_FIELD_NUMBER: _ClassVar[int]
    EDIT_FIELD_NUMBER: _ClassVar[int]
    AT_FIELD_NUMBER: _ClassVar[int]
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    history: str
    edit: str
    at: int
    request: WriteRequest
    def __init__(self, history: _Optional[str] = ..., edit: _Optional[str] = ..., at: _Optional[int] = ..., request: _Optional[_Union[WriteRequest, _Mapping]] = ...) -> None: ...

class Settled(_message.Message):
    __slots__ = ("epoch", "rows_since")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    ROWS_SINCE_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    rows_since: int
    def __init__(self, epoch: _Optional[int] = ..., rows_since: _Optional[int] = ...) -> None: ...
