"""When a checkpoint is saved, which ones are kept, and that stock DeepSpeed can read them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from chatgot.checkpoint import manifest, writing
from chatgot.checkpoint.load import examine, find
from chatgot.checkpoint.retention import prune
from chatgot.checkpoint.writing import tag_of, take_back, writer
from chatgot.deepspeed_json.settings import CheckpointConfig
from chatgot.errors import CheckpointError
from chatgot.training import run
from chatgot.training import saving as saving_module
from tests.support import engine_json, write_json, write_run_yaml
from tests.training import in_process
from tests.training.in_process import argv, events, series, tags


def saving(tmp_path: Path, **keys) -> Path:
    checkpoint = {"every_steps": None, "every_minutes": None, "keep_best": 0, "keep_last": 99, **keys}
    return write_json(tmp_path / "engine.json", engine_json(1, chatgot={"checkpoint": checkpoint}))


def test_every_n_steps_and_at_the_end(tmp_path, text_file):
    config = write_run_yaml(tmp_path / "run.yaml", max_steps=8)
    assert in_process.train(argv(saving(tmp_path, every_steps=3), tmp_path / "out", config, text_file)) == 0
    assert tags(tmp_path / "out") == [3, 6, 8]
    assert [event["step"] for event in events(tmp_path / "out", "saved")] == [3, 6, 8]


def test_every_m_minutes_since_the_last_save(tmp_path, text_file):
    config = write_run_yaml(tmp_path / "run.yaml", max_steps=8)
    loop = in_process.prepare(argv(saving(tmp_path, every_minutes=2.0), tmp_path / "out", config, text_file))
    loop.saving = saving_module.Saving(loop.saving.saver, loop.records, clock=lambda: 50.0 * loop.step)
    run.finish(loop)
    assert tags(tmp_path / "out") == [3, 6, 8]  # 150 s, 150 s, the end


def test_invariant_14_rotation_keeps_latest_and_best(tmp_path, text_file):
    config = write_run_yaml(tmp_path / "run.yaml", max_steps=14, eval_every=1)
    engine = saving(tmp_path, every_steps=1, keep_last=2, keep_best=1, keep_every_steps=7)
    # A rate that rises and wrecks the model: the best checkpoint is an old one.
    words = [
        *argv(engine, tmp_path / "out", config, text_file),
        "ds.optimizer.params.lr=2.0",
        "ds.chatgot.schedule.warmup_steps=100",
    ]
    assert in_process.train(words) == 0
    val = series(tmp_path / "out", "val/loss")
    best = min(val, key=lambda step: val[step])
    assert best not in (7, 13, 14), f"the test needs a best step of its own, not {best}"
    assert tags(tmp_path / "out") == sorted({best, 7, 13, 14})
    assert (tmp_path / "out" / "checkpoints" / "latest").read_text() == tag_of(14)
    assert manifest.read(tmp_path / "out" / "checkpoints" / tag_of(best))["val_loss"] == val[best]
    assert not list((tmp_path / "out" / "checkpoints").glob(".*"))


def test_best_model_so_far_is_saved_when_it_is_found(tmp_path, text_file):
    config = write_run_yaml(tmp_path / "run.yaml", max_steps=5, eval_every=2)
    assert in_process.train(argv(saving(tmp_path, keep_best=1), tmp_path / "out", config, text_file)) == 0
    assert tags(tmp_path / "out") == [2, 4, 5]


@settings(max_examples=60, deadline=None)
@given(
    losses=st.dictionaries(st.integers(1, 40), st.none() | st.floats(0.1, 9.0), min_size=1, max_size=12),
    keep_last=st.integers(2, 4),
    keep_best=st.integers(0, 3),
    every=st.none() | st.integers(1, 10),
)
def test_rotation_keeps_what_its_rules_name_and_nothing_else(tmp_path_factory, losses, keep_last, keep_best, every):
    folder = tmp_path_factory.mktemp("rotation")
    for step, loss in losses.items():
        (folder / tag_of(step)).mkdir()
        (folder / tag_of(step) / "weights").write_text("x")
        files = {"weights": manifest.measure(folder / tag_of(step) / "weights")}
        manifest.write(folder / tag_of(step), {"step": step, "sequence": step, "val_loss": loss, "files": files})
    gone = prune(folder, CheckpointConfig(keep_last=keep_last, keep_best=keep_best, keep_every_steps=every))
    assert (gone.warnings, gone.damaged) == ((), ())
    kept = {checkpoint.step for checkpoint in examine(folder).good}
    newest = set(sorted(losses)[-keep_last:])
    scored = {step: loss for step, loss in losses.items() if loss is not None}
    best = set(sorted(scored, key=lambda step: (scored[step], step))[:keep_best])
    multiples = {step for step in losses if every and step % every == 0}
    assert kept == newest | best | multiples
    assert set(gone.tags) == {tag_of(step) for step in losses.keys() - kept}
    assert {path.name for path in folder.iterdir()} == {tag_of(step) for step in kept}


def test_the_same_step_saved_again_replaces_its_checkpoint(tmp_path, text_file):
    config = write_run_yaml(tmp_path / "run.yaml", max_steps=4)
    words = argv(saving(tmp_path, every_steps=2), tmp_path / "out", config, text_file)
    assert in_process.train(words) == 0
    checkpoints = tmp_path / "out" / "checkpoints"
    before = manifest.read(checkpoints / tag_of(4))
    # From step 2 again, with another rate: step 4 is another model now.
    assert (
        in_process.train([*words, "--resume_from", f"{tmp_path / 'out'}@{tag_of(2)}", "ds.optimizer.params.lr=1e-4"])
        == 0
    )
    assert tags(tmp_path / "out") == [2, 4]
    assert manifest.read(checkpoints / tag_of(4))["val_loss"] != before["val_loss"]
    assert not list(checkpoints.glob(".*"))


def test_invariant_14_latest_is_kept_when_a_resume_went_back_behind_newer_checkpoints(tmp_path, text_file):
    config = write_run_yaml(tmp_path / "run.yaml", max_steps=9)
    words = argv(saving(tmp_path, every_steps=2, keep_last=2), tmp_path / "out", config, text_file)
    assert in_process.train([*words, "ds.chatgot.checkpoint.keep_every_steps=2"]) == 0
    assert tags(tmp_path / "out") == [2, 4, 6, 8, 9]
    in_process.abandon_after(4, [*words, "--resume_from", f"{tmp_path / 'out'}@{tag_of(2)}"])
    assert (tmp_path / "out" / "checkpoints" / "latest").read_text() == tag_of(4)
    assert tags(tmp_path / "out") == [4, 9], "the two that were published last"
    assert in_process.prepare(words).step == 4, (
        "the run goes on from where it was left, not from the past that was given up"
    )


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_stock_deepspeed_reads_the_checkpoint_through_latest(stage, tmp_path, text_file):
    config = write_run_yaml(tmp_path / "run.yaml", max_steps=3)
    engine = write_json(tmp_path / "engine.json", engine_json(stage))
    assert in_process.train(argv(engine, tmp_path / "out", config, text_file)) == 0
    loop = in_process.prepare(argv(engine, tmp_path / "other", config, text_file))
    with in_process.cpu_environment():
        path, _ = loop.engine.engine.load_checkpoint(str(tmp_path / "out" / "checkpoints"))
    assert Path(path).parent == tmp_path / "out" / "checkpoints" / tag_of(3)
    assert loop.step == 3
    loop.save(must=True)
    trained, read = (in_process.weights(tmp_path / name) for name in ("out", "other"))
    assert trained.keys() == read.keys()
    assert all(torch.equal(trained[name], read[name]) for name in trained)


def publish(folder: Path, step: int, sequence: int) -> None:
    """A whole checkpoint, as far as files go."""
    (folder / tag_of(step)).mkdir()
    torch.save({"weights": step}, folder / tag_of(step) / "mp_rank_00_model_states.pt")
    files = {name: manifest.measure(folder / tag_of(step) / name) for name in manifest.listed(folder / tag_of(step))}
    manifest.write(folder / tag_of(step), {"step": step, "sequence": sequence, "files": files})


def test_stray_names_in_the_folder_of_checkpoints_make_no_save_fail(tmp_path, text_file, capsys):
    config = write_run_yaml(tmp_path / "run.yaml", max_steps=2)
    folder = tmp_path / "out" / "checkpoints"
    for name in (".unfinished-x/deep", ".latest.tmp-99", "latest"):
        (folder / name).mkdir(parents=True)
    (folder / ".unfinished-y").write_text("")
    assert in_process.train(argv(saving(tmp_path, every_steps=1), tmp_path / "out", config, text_file)) == 0
    assert tags(tmp_path / "out") == [1, 2]
    assert not events(tmp_path / "out", "save_failed")
    assert f"{folder / 'latest'}: is a folder, so that it cannot name step-00000002" in capsys.readouterr().out
    assert not list(folder.glob(".*"))
    found = find(folder)
    assert found is not None
    assert (found.tag, found.notes) == (tag_of(2), ())


def test_pointer_that_is_lost_or_wrong_is_never_followed(tmp_path):
    outside, folder = tmp_path / "outside", tmp_path / "checkpoints"
    for made in (outside, folder):
        made.mkdir()
    publish(outside, 50, 9)
    assert find(folder) is None
    publish(folder, 3, 1)
    publish(folder, 12, 2)
    (folder / ".unfinished-step-00000020").mkdir()
    pointers = [
        tag_of(3),
        tag_of(77),
        "",
        "../outside/step-00000050",
        str(outside / tag_of(50)),
        f"{tag_of(12)}\r\n",
        "step-3\nstep-12",
        "\udcff",
    ]
    for pointer in pointers:
        (folder / "latest").write_bytes(pointer.encode("utf-8", "surrogateescape"))
        found = find(folder)
        assert found is not None
        assert (found.tag, found.path) == (tag_of(12), folder / tag_of(12))
        assert len(found.notes) == (1 if pointer else 0), found.notes
    (folder / "latest").unlink()
    (folder / "latest").symlink_to(outside / tag_of(50) / "manifest.json")
    found = find(folder)
    assert found is not None
    assert found.tag == tag_of(12)
    assert "not followed" in found.notes[0]
    for name in (
        "../outside/step-00000050",
        str(outside / tag_of(50)),
        "..",
        "",
        ".unfinished-step-00000020",
        tag_of(12) + "\n",
    ):
        with pytest.raises(CheckpointError):
            find(folder, name)


def test_links_do_not_lead_out_of_the_folder(tmp_path):
    outside, folder = tmp_path / "outside", tmp_path / "checkpoints"
    for made in (outside, folder):
        made.mkdir()
    publish(folder, 3, 1)
    publish(outside, 50, 9)
    (folder / tag_of(50)).symlink_to(outside / tag_of(50))
    publish(folder, 12, 2)
    file = folder / tag_of(12) / "mp_rank_00_model_states.pt"
    file.rename(outside / "weights.pt")
    file.symlink_to(outside / "weights.pt")
    found = find(folder)
    assert found is not None
    assert found.tag == tag_of(3)
    said = "\n".join(found.notes)
    assert f"{folder / tag_of(50)} is damaged: it is a symbolic link" in said
    assert (
        f"{folder / tag_of(12)} is damaged: file mp_rank_00_model_states.pt: is, or is reached through, a symbolic link"
        in said
    )
    for step in (50, 12):
        with pytest.raises(CheckpointError, match="symbolic link"):
            find(folder, tag_of(step))


@pytest.mark.parametrize("name", ["../outside.pt", "/etc/hostname", "a/../../outside.pt"])
def test_manifest_cannot_name_files_outside(name, tmp_path):
    publish(tmp_path, 3, 1)
    fields = manifest.read(tmp_path / tag_of(3))
    (tmp_path / "outside.pt").write_bytes(b"x")
    fields["files"][name] = {"bytes": 1, "sha256": "0"}
    manifest.write(tmp_path / tag_of(3), fields)
    with pytest.raises(CheckpointError, match="leads out of the checkpoint"):
        find(tmp_path)


def test_checkpoint_that_made_way_for_another_one_is_taken_back_if_that_one_never_came(tmp_path):
    publish(tmp_path, 3, 1)
    (tmp_path / tag_of(3)).rename(tmp_path / f".replaced-{tag_of(3)}")
    assert find(tmp_path) is None
    take_back(tmp_path)
    found = find(tmp_path)
    assert found is not None
    assert found.tag == tag_of(3)


def test_manifest_of_a_version_without_hashes_is_refused(tmp_path):
    publish(tmp_path, 3, 1)
    (tmp_path / tag_of(3) / "manifest.json").write_text('{"format_version": 1, "step": 3}')
    with pytest.raises(CheckpointError, match="format version 1 has no hashes"):
        find(tmp_path)


@pytest.mark.parametrize(
    ("name", "rank"),
    [
        ("mp_rank_00_model_states.pt", 0),
        ("zero_pp_rank_3_mp_rank_00_model_states.pt", 3),
        ("bf16_zero_pp_rank_12_mp_rank_00_optim_states.pt", 12),
        ("zero_pp_rank_1_mp_rank_00_optim_states.pt", 1),
        ("offloaded_tensors/rank5/x.tensor.swp", 5),
        ("something_new.pt", 0),
    ],
)
def test_every_file_has_one_rank_that_answers_for_it(name, rank):
    assert writer(name) == rank


def test_ranks_that_do_not_share_a_file_system_are_told_so(tmp_path, monkeypatch):
    monkeypatch.setattr(writing, "VISIBLE_WITHIN_S", 0.0)
    (tmp_path / "mp_rank_00_model_states.pt").write_bytes(b"weights")
    one: writing.Measured = {"bytes": 7, "sha256": ""}
    hashed = [{"mp_rank_00_model_states.pt": one}, {"zero_pp_rank_1_mp_rank_00_optim_states.pt": one}]
    with pytest.raises(CheckpointError, match=r"rank 1 wrote zero_pp_rank_1_.*do not share this file system"):
        writing.check_shared(tmp_path, hashed)
    (tmp_path / "zero_pp_rank_1_mp_rank_00_optim_states.pt").write_bytes(b"1")
    writing.check_shared(tmp_path, hashed)
    with pytest.raises(CheckpointError, match="nobody has written"):
        writing.check_shared(tmp_path, hashed[:1])
