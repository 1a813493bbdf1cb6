"""Records of the swarm, and the rules that decide which of them count.

Bytes and a fixed time in; accepted or refused: no network, no clock, no torch.

errors      the tree of refusals, each with the number of its rule in SPEC.md
canonical   JSON as the protocol speaks it: one way to write, a strict way to read
digest      BLAKE3 of bytes, files and chunks
files       atomic writes and quarantine (with ``digest`` and ``manifest`` the only I/O of this room)
identity    the one Ed25519 key of a peer, and peer ids
envelope    DSSE: the signature around every record
fields      field types and the base model that records share
records     claim, announcement, holding: what travels over the DHT
manifest    the files of a checkpoint, bound by one root
provenance  what a checkpoint was trained on, and the chain of its parents
plan        what a swarm trains, signed by its organiser
admission   tokens for plans that admit invited peers only, delegations, a node's own lists
notice      what the organiser says while a swarm runs: paused, ended, keys revoked
greeting    the first message on every stream
invite      the one string a person pastes
dht_rules   DHT keys, and what a node may store under them
header      a safetensors header against the plan's table
trusted     the verification workflow: feed bytes, get verified records
"""

from paris_swarm.dht_schemas.admission import (
    PeerLists,
    check_delegation,
    check_token,
    parse_peer_list,
    seal_delegation,
    seal_token,
)
from paris_swarm.dht_schemas.canonical import canonical_json, parse_json
from paris_swarm.dht_schemas.dht_rules import check_store, checkpoint_key, claim_key, dht_id
from paris_swarm.dht_schemas.digest import CHUNK, blake3_hex, chunk_count, chunk_digests, digest_file
from paris_swarm.dht_schemas.envelope import Sealed, payload_type, seal, unseal
from paris_swarm.dht_schemas.errors import (
    BadHeader,
    BadManifest,
    BadSignature,
    Blocked,
    BrokenChain,
    CheckpointTooLarge,
    DigestMismatch,
    Equivocation,
    InviteError,
    LeaseExpired,
    LeaseMismatch,
    LeaseTooLong,
    MalformedRecord,
    NotAdmitted,
    NotAProof,
    NotFinite,
    ProbeFailed,
    RecordError,
    RecordTooLarge,
    Revoked,
    Rollback,
    WrongKey,
    WrongKind,
    WrongPlan,
    WrongSigner,
    WrongSlot,
)
from paris_swarm.dht_schemas.fields import ROUTER
from paris_swarm.dht_schemas.files import atomic_write, atomic_write_json, quarantine
from paris_swarm.dht_schemas.greeting import MAX_GREETING, MAX_PROOFS, Greeting
from paris_swarm.dht_schemas.header import check_safetensors_header, header_length
from paris_swarm.dht_schemas.identity import Identity, public_key_bytes, verify
from paris_swarm.dht_schemas.invite import Invite, peer_address, peer_id_in
from paris_swarm.dht_schemas.manifest import (
    MAX_MANIFEST,
    FileEntry,
    Manifest,
    build_manifest,
    file_entry,
    open_manifest,
)
from paris_swarm.dht_schemas.notice import MAX_NOTICE, Notice, Standing, open_notice, seal_notice, standing_of
from paris_swarm.dht_schemas.plan import (
    MAX_PLAN,
    Bars,
    ExpertVariant,
    OpenedPlan,
    Plan,
    Policy,
    SlotSpec,
    TensorSpec,
    Verification,
    open_plan,
    seal_plan,
)
from paris_swarm.dht_schemas.provenance import Chain, Environment, Provenance, RowsUsed, check_link, walk_chain
from paris_swarm.dht_schemas.records import (
    CLOCK_TOLERANCE_S,
    MAX_LEASE_S,
    MAX_RECORD,
    Announcement,
    Claim,
    Holding,
    Opened,
    Progress,
)
from paris_swarm.dht_schemas.trusted import EquivocationProof, TrustedSwarm, check_proof

__all__ = [
    "CHUNK",
    "CLOCK_TOLERANCE_S",
    "MAX_GREETING",
    "MAX_LEASE_S",
    "MAX_MANIFEST",
    "MAX_NOTICE",
    "MAX_PLAN",
    "MAX_PROOFS",
    "MAX_RECORD",
    "ROUTER",
    "Announcement",
    "BadHeader",
    "BadManifest",
    "BadSignature",
    "Bars",
    "Blocked",
    "BrokenChain",
    "Chain",
    "CheckpointTooLarge",
    "Claim",
    "DigestMismatch",
    "Environment",
    "Equivocation",
    "EquivocationProof",
    "ExpertVariant",
    "FileEntry",
    "Greeting",
    "Holding",
    "Identity",
    "Invite",
    "InviteError",
    "LeaseExpired",
    "LeaseMismatch",
    "LeaseTooLong",
    "MalformedRecord",
    "Manifest",
    "NotAProof",
    "NotAdmitted",
    "NotFinite",
    "Notice",
    "Opened",
    "OpenedPlan",
    "PeerLists",
    "Plan",
    "Policy",
    "ProbeFailed",
    "Progress",
    "Provenance",
    "RecordError",
    "RecordTooLarge",
    "Revoked",
    "Rollback",
    "RowsUsed",
    "Sealed",
    "SlotSpec",
    "Standing",
    "TensorSpec",
    "TrustedSwarm",
    "Verification",
    "WrongKey",
    "WrongKind",
    "WrongPlan",
    "WrongSigner",
    "WrongSlot",
    "atomic_write",
    "atomic_write_json",
    "blake3_hex",
    "build_manifest",
    "canonical_json",
    "check_delegation",
    "check_link",
    "check_proof",
    "check_safetensors_header",
    "check_store",
    "check_token",
    "checkpoint_key",
    "chunk_count",
    "chunk_digests",
    "claim_key",
    "dht_id",
    "digest_file",
    "file_entry",
    "header_length",
    "open_manifest",
    "open_notice",
    "open_plan",
    "parse_json",
    "parse_peer_list",
    "payload_type",
    "peer_address",
    "peer_id_in",
    "public_key_bytes",
    "quarantine",
    "seal",
    "seal_delegation",
    "seal_notice",
    "seal_plan",
    "seal_token",
    "standing_of",
    "unseal",
    "verify",
    "walk_chain",
]
