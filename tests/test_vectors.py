"""Files put aside on a real server: used by edits and captures, counted against a quota, nobody else's."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import grpc
import numpy as np
import pytest
import tiny
import torch
from cutaway import (
    AsyncClient,
    Capture,
    Client,
    Edit,
    InvalidArgument,
    NotFound,
    PermissionDenied,
    ResourceExhausted,
    Stored,
)  # fmt: skip
from cutaway.v1 import stored_pb2 as pb
from cutaway.v1.introspection_pb2_grpc import IntrospectionStub
from cutaway_server.errors import ModelError
from cutaway_server.service.files import load_files
from hooked import Hooked
from safetensors.numpy import save_file
from safetensors.torch import save_file as save_torch
from secured import write_keys
from serving import serving

PROMPT = list(range(40, 75))
RANDOM = np.random.default_rng(5)
STEER = RANDOM.normal(size=64).astype(np.float32)
DIRECTIONS = RANDOM.normal(size=(3, 64)).astype(np.float32)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SimpleNamespace]:
    path = tmp_path_factory.mktemp("models") / "tiny"
    shared = tmp_path_factory.mktemp("vectors")
    save_file({"v": STEER}, shared / "steer.safetensors")
    model = tiny.save_tiny("qwen3", path)
    with (
        serving(path, max_batch_tokens=64, vectors=str(shared), stored_bytes=2**17) as live,
        Client(live.address) as client,
    ):
        yield SimpleNamespace(client=client, live=live, model=model, oracle=Hooked(model, PROMPT))


@pytest.fixture
def kept(served: SimpleNamespace) -> Iterator[SimpleNamespace]:
    file = served.client.put_vectors({"steer": STEER, "some": DIRECTIONS}, name="mine")
    yield SimpleNamespace(client=served.client, file=file)
    for each in served.client.list_vectors():
        if not each.shared:
            served.client.delete_vectors(each)


def logits(client: Client, *edits: Edit) -> np.ndarray:
    return client.trace(token_ids=PROMPT, points=["logits"], edits=edits)["logits"].values


@pytest.mark.parametrize(
    ("by_name", "by_value"),
    [
        (lambda f: Edit.add("resid_post.1", f["steer"], scale=3.0), lambda: Edit.add("resid_post.1", 3 * STEER)),
        (
            lambda f: Edit.add("resid_post.1", f["some", 2], positions=[3]),
            lambda: Edit.add("resid_post.1", DIRECTIONS[2], positions=[3]),
        ),
        (
            lambda f: Edit.set("mlp_out.0", f["some"], positions=[4, 9, 20]),
            lambda: Edit.set("mlp_out.0", DIRECTIONS, positions=[4, 9, 20]),
        ),
        (
            lambda f: Edit.project_out("resid_mid.2", f["some"]),
            lambda: Edit.project_out("resid_mid.2", DIRECTIONS),
        ),
        (
            lambda f: Edit.clamp("resid_pre.1", f["steer"], max=0.5),
            lambda: Edit.clamp("resid_pre.1", STEER, max=0.5),
        ),
    ],
    ids=["add", "add a row", "set", "project out", "clamp"],
)  # fmt: skip
def test_an_edit_that_names_numbers_does_what_one_that_brings_them_does(
    kept: SimpleNamespace, by_name: object, by_value: object
) -> None:
    named = logits(kept.client, by_name(kept.file))  # type: ignore[operator]
    assert np.array_equal(named, logits(kept.client, by_value()))  # type: ignore[operator]
    assert not np.allclose(named, logits(kept.client), atol=1e-3)


def test_projections_take_stored_vectors_and_the_operators_by_name(
    served: SimpleNamespace, kept: SimpleNamespace
) -> None:
    residual = served.oracle.values["blocks.1.hook_resid_post"].detach().numpy()
    for stored, vectors in (
        (kept.file["some"], DIRECTIONS), (kept.file["some", 1], DIRECTIONS[1:2]), (Stored("steer"), STEER[None]),
    ):  # fmt: skip
        [seen] = kept.client.trace(token_ids=PROMPT, captures=[Capture("resid_post.1", project=stored)]).values()
        assert np.allclose(seen, residual @ vectors.T, atol=1e-3)


def test_the_tuned_lens_translates_what_each_layer_reads(served: SimpleNamespace) -> None:
    source = torch.Generator().manual_seed(3)
    lens = {}
    for layer in range(3):
        lens[f"{layer}.weight"] = 0.1 * torch.randn(64, 64, generator=source)
        lens[f"{layer}.bias"] = torch.randn(64, generator=source)
    file = served.client.put_vectors(lens)
    assert file.kind == "tuned lens"
    told = served.client.logit_lens(token_ids=PROMPT, top_k=4, tokens=[7], translators=file)
    for layer in range(4):
        last = layer == 3
        h = served.oracle.values["blocks.2.hook_resid_post" if last else f"blocks.{layer}.hook_resid_pre"]
        if not last:
            h = h + h @ lens[f"{layer}.weight"].T + lens[f"{layer}.bias"]
        with torch.no_grad():
            logprobs = torch.log_softmax(served.model.lm_head(served.model.model.norm(h)), -1)
        assert np.allclose(told.logprobs[layer], logprobs.topk(4).values, atol=2e-4), layer
        assert np.allclose(told.given_logprobs[layer][:, 0], logprobs[:, 7], atol=2e-4), layer
    after = Capture("resid_post.*", layers=[0, 2], lens=1, lens_tokens=[7], translators=file.id)
    seen = served.client.trace(token_ids=PROMPT, captures=[after])
    first = seen["blocks.0.hook_resid_post"].parts["given_logprobs"]
    assert np.allclose(first[:, 0], told.given_logprobs[1][:, 0], atol=1e-5), "what block 0 leaves, block 1 reads"
    served.client.delete_vectors(file)


def test_an_id_is_the_content_and_files_are_listed_renamed_and_forgotten(served: SimpleNamespace) -> None:
    client = served.client
    first = client.put_vectors({"a": STEER}, name="one")
    again = client.put_vectors({"a": STEER}, name="two")
    other = client.put_vectors({"a": STEER + 1})
    assert first.id == again.id != other.id
    files = client.list_vectors()
    assert [(file.name, file.shared) for file in files] == [("steer", True), ("two", False), ("", False)]
    assert (files.bytes, files.max_bytes) == (2 * 256, 2**17)
    assert files.files[1].tensors == {"a": (64,)}
    for file in (first, other):
        client.delete_vectors(file)
    assert client.list_vectors().bytes == 0
    with pytest.raises(NotFound, match=first.id):
        client.delete_vectors(first)
    with pytest.raises(NotFound):
        client.delete_vectors(files.files[0])  # the operator's
    with pytest.raises(InvalidArgument, match=r"edits\[0\].add.stored.id.*no file of this id is kept"):
        logits(client, Edit.add("resid_post.1", first["a"]))


def test_files_of_every_float_type_are_read_as_they_are(served: SimpleNamespace, tmp_path: Path) -> None:
    tensors = {
        name: torch.arange(64).to(dtype) / 8
        for name, dtype in {"a": torch.bfloat16, "b": torch.float16, "c": torch.float64, "d": torch.float32}.items()
    }
    save_torch(tensors, tmp_path / "all.safetensors")
    file = served.client.put_vectors(tmp_path / "all.safetensors")
    captures = [Capture("resid_post.1", project=file[name]) for name in "abcd"]
    arrays = [*served.client.trace(token_ids=PROMPT, captures=captures).values()]
    assert all(np.array_equal(array.values, arrays[0].values) for array in arrays)
    served.client.delete_vectors(file)


def test_the_quota_refuses_before_everything_has_come(served: SimpleNamespace) -> None:
    client = served.client
    with pytest.raises(ResourceExhausted, match=f"of at most {2**17}"):
        client.put_vectors(np.zeros((64, 1024)))
    half = client.put_vectors(np.zeros(15_000))
    with pytest.raises(ResourceExhausted, match="delete_vectors makes room"):
        client.put_vectors(np.ones(20_000))
    client.put_vectors(np.zeros(15_000))  # the same again takes no more
    client.delete_vectors(half)
    client.delete_vectors(client.put_vectors(np.ones(20_000)))
    shelf = served.live.server._generation.shelf
    assert not shelf._arriving
    assert shelf.used("") == 0


def test_half_precision_is_counted_as_it_is_held(served: SimpleNamespace, tmp_path: Path) -> None:
    save_file({"v": np.zeros(50_000, np.float16)}, tmp_path / "half.safetensors")  # 100,000 bytes, and 200,000 in F32
    with pytest.raises(ResourceExhausted, match="takes 200000 bytes, where all numbers are F32"):
        served.client.put_vectors(tmp_path / "half.safetensors")


def damaged(tmp_path: Path, **tensors: np.ndarray) -> bytes:
    save_file(tensors, tmp_path / "f.safetensors")
    return (tmp_path / "f.safetensors").read_bytes()


def test_what_is_no_file_of_finite_floats_is_refused(served: SimpleNamespace, tmp_path: Path) -> None:
    good = damaged(tmp_path, v=STEER)
    cases = {
        b"": "no safetensors file",
        b"12345678901": "header claims",
        good[:-4]: "truncated",
        good + b"more": "follow the last tensor",
        good.replace(b'"F32"', b'"F16"'): "needs 128 bytes",
        damaged(tmp_path, v=STEER.astype(np.int32)): "must be F64, F32, F16, BF16",
        damaged(tmp_path, v=np.full(3, np.nan, np.float32)): "not finite",
        damaged(tmp_path, v=np.full(3, 1e300)): "not finite",
        damaged(tmp_path, **{"x" * 257: STEER}): "257 characters",
    }
    for data, words in cases.items():
        (tmp_path / "sent").write_bytes(data)
        with pytest.raises(InvalidArgument, match=words):
            served.client.put_vectors(tmp_path / "sent")
    with pytest.raises(FileNotFoundError):
        served.client.put_vectors(tmp_path / "nowhere")
    with pytest.raises(InvalidArgument, match=r"header\.name"):
        served.client.put_vectors(STEER, name="no spaces")
    header, data = pb.PutVectorsRequest(header=pb.VectorsHeader()), pb.PutVectorsRequest(data=good)
    with grpc.insecure_channel(served.live.address) as channel:
        for messages in ([], [data], [header, header], [header, data, header]):
            with pytest.raises(grpc.RpcError) as refusal:
                IntrospectionStub(channel).PutVectors(iter(messages))
            assert refusal.value.code() is grpc.StatusCode.INVALID_ARGUMENT
            assert "header" in refusal.value.details()


@pytest.mark.parametrize(
    ("ask", "words"),
    [
        (lambda f: Edit.add("resid_post.1", Stored(f.id, "nothing")), ["add.stored.tensor", "some, steer"]),
        (lambda f: Edit.add("resid_post.1", Stored(f.id)), ["add.stored.tensor"]),
        (lambda f: Edit.add("resid_post.1", Stored(f.id, "some", (3,))), ["rows 0 to 2"]),
        (lambda f: Edit.add("resid_post.1", Stored(f.id, "steer", (0,))), ["one axis"]),
        (lambda f: Edit.add("z.1", f["steer"]), ["add.vector", "64 numbers"]),
        (lambda f: Capture("z.1", project=f["steer"]), ["project.stored", "24 numbers"]),
        (lambda f: Capture("resid_pre.1", lens=1, translators=f), ["lens.translators", "no tuned lens"]),
        (lambda f: Capture("resid_pre.1", lens=1, translators="x"), ["lens.translators", "no file of this id"]),
        (lambda f: Capture("resid_mid.1", lens=1, translators=f), ["lens.translators", "hook_resid_pre"]),
    ],
)
def test_references_that_fit_nothing_are_refused(kept: SimpleNamespace, ask: object, words: list[str]) -> None:
    made = ask(kept.file)  # type: ignore[operator]
    options = {"edits": [made], "points": ["logits"]} if isinstance(made, Edit) else {"captures": [made]}
    with pytest.raises(InvalidArgument) as refusal:
        kept.client.trace(token_ids=PROMPT, **options)
    assert all(word in str(refusal.value) for word in words), str(refusal.value)


def test_pages_of_edits_by_name_are_told_apart_by_content(kept: SimpleNamespace) -> None:
    client = kept.client
    edit = Edit.add("resid_pre.0", kept.file["steer"], scale=2.0)
    first = client.complete(token_ids=PROMPT, edits=[edit], max_tokens=4, temperature=0, ignore_eos=True)
    again = client.complete(token_ids=PROMPT, edits=[edit], max_tokens=4, temperature=0, ignore_eos=True)
    assert again.usage.cached_tokens > 0
    assert again.token_ids == first.token_ids
    other = client.put_vectors({"steer": -STEER, "some": DIRECTIONS})
    edit = Edit.add("resid_pre.0", other["steer"], scale=2.0)
    assert client.complete(token_ids=PROMPT, edits=[edit], max_tokens=1).usage.cached_tokens == 0


def test_files_are_a_tenants_own_and_ask_for_a_scope(tmp_path: Path) -> None:
    tiny.save_tiny("llama", tmp_path / "tiny")
    keys = write_keys(
        tmp_path / "keys.toml",
        {"a": (["introspect"], "one"), "b": (["introspect"], "two"), "e": (["edit"], "one"), "g": (["generate"], "t")},
    )
    with serving(tmp_path / "tiny", api_keys=str(tmp_path / "keys.toml"), stored_bytes=400) as live:
        with Client(live.address, api_key=keys["a"]) as a, Client(live.address, api_key=keys["b"]) as b:
            file = a.put_vectors(STEER)
            assert len(b.list_vectors()) == 0
            with pytest.raises(NotFound):
                b.delete_vectors(file)
            with pytest.raises(InvalidArgument, match="no file of this id"):
                b.trace("Hi", captures=[Capture("resid_post.1", project=file["vector"])])
            assert b.put_vectors(STEER).id == file.id, "its room is its own"
        with Client(live.address, api_key=keys["e"]) as e:
            assert [each.id for each in e.list_vectors()] == [file.id]
        with Client(live.address, api_key=keys["g"]) as g, pytest.raises(PermissionDenied):
            g.put_vectors(STEER)


async def test_the_asynchronous_client_puts_aside_too(served: SimpleNamespace) -> None:
    async with AsyncClient(served.live.address) as client:
        file = await client.put_vectors(STEER, name="async")
        assert file.id in [each.id for each in await client.list_vectors()]
        await client.delete_vectors(file.id)
        with pytest.raises(NotFound):
            await client.delete_vectors(file)
        with pytest.raises(InvalidArgument):
            await client.put_vectors(np.full(3, np.inf))


def test_the_operators_files_are_checked_at_the_start(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"--vectors: .* has no .safetensors file"):
        load_files(tmp_path)
    (tmp_path / "bad.safetensors").write_bytes(b"bad")
    with pytest.raises(ModelError, match=r"bad.safetensors: damaged"):
        load_files(tmp_path)
    with pytest.raises(ModelError, match="cannot be read"):
        load_files(tmp_path / "nowhere.safetensors")
