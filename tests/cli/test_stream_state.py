"""`tintc run --stream --state`: what was stopped goes on with the same bits."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.cli.test_stream_command import LONG, SIZES, lines, ran
from tests.support.artifacts import TEXT, artifact
from tests.support.command import tintc
from tintc.commands import stream
from tintc.runtime.reading import Piece, Rows


def stop(patch: pytest.MonkeyPatch, at: int, error: BaseException) -> None:
    """Ends a run in front of its so-manieth step, or, as a kill may, behind the step after it."""
    own, steps = Rows.step, 0

    def step(rows: Rows) -> list[Piece]:
        nonlocal steps
        steps += 1
        if steps == at and isinstance(error, KeyboardInterrupt):
            raise error
        pieces = own(rows)
        if steps == at + 1:
            raise error
        return pieces

    patch.setattr(Rows, "step", step)


class TestState:
    @pytest.fixture
    def given(self, tmp_path: Path) -> tuple[object, ...]:
        """Two rows, the second of which begins another document while the first reads."""
        texts = (f"{LONG} {TEXT}", TEXT, "The sea and the town.", LONG)
        (tmp_path / "docs.jsonl").write_text(
            "".join(json.dumps({"text": text}) + "\n" for text in texts)
        )
        return ("--file", tmp_path / "docs.jsonl", *SIZES, "--batch", 2, "--json")

    @pytest.mark.parametrize(
        ("error", "keys"),
        [
            (KeyboardInterrupt(), "cache"),
            (RuntimeError("killed"), "recompute"),
            pytest.param(KeyboardInterrupt(), "recompute", marks=pytest.mark.slow),
            pytest.param(RuntimeError("killed"), "cache", marks=pytest.mark.slow),
        ],
    )
    def test_it_goes_on_with_the_same_bits(
        self, given: tuple[object, ...], error: BaseException, keys: str, tmp_path: Path
    ) -> None:
        given = (*given, "--keys", keys)
        whole = ran(*given, "--scores", tmp_path / "whole").document
        files = ("--scores", tmp_path / "scores", "--state", tmp_path / "state")
        for at in (1, 4):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(stream, "_WORK_PER_SAVE", 0)  # a save behind every chunk
                stop(patch, at, error)
                stopped = ran(*given, *files, code=1 if isinstance(error, RuntimeError) else 130)
            assert stopped.out == ""
        written = (tmp_path / "scores").read_bytes()
        assert 0 < len(written) < len((tmp_path / "whole").read_bytes())
        (tmp_path / "scores").write_bytes(written + b'{"document": 0, "posi')  # cut short by a kill
        assert ran(*given, *files).document == whole
        assert (tmp_path / "scores").read_bytes() == (tmp_path / "whole").read_bytes()
        assert ran(*given, *files).document == whole  # nothing is left to do
        assert {file.name for file in tmp_path.iterdir()} == {
            "docs.jsonl", "whole", "scores", "state"
        }  # fmt: skip

    @pytest.mark.slow
    def test_a_state_of_something_else_is_refused(
        self, given: tuple[object, ...], tmp_path: Path
    ) -> None:
        state = ("--state", tmp_path / "state")
        ran(*given, *state)
        kept = (tmp_path / "state").read_bytes()
        (tmp_path / "docs2.jsonl").write_text(json.dumps({"text": TEXT}))
        others: list[tuple[tuple[object, ...], str]] = [
            ((*given, "--inner-lr", 0.02), "made with inner_lr 0.01; this stream has 0.02"),
            ((*given, "--chunk", 5), "made with chunk 6; this stream has 5"),
            ((*given, "--keys", "cache"), "made with keys recompute; this stream has cache"),
            ((*given, "--batch", 3), "made with batch 2; this stream has 3"),
            ((*given, "--tokens", 20), "over other texts"),
            (("--file", tmp_path / "docs2.jsonl", *SIZES), "over other texts"),
            ((*given, "--dtype", "float64"), "another model or other weights"),
            ((*given, "--scores", tmp_path / "new"), "a stream without --scores"),
        ]
        for command, words in others:
            message = tintc("run", artifact("exact"), *command, *state).refused(2)
            assert words in message
            assert str(tmp_path / "state") in message
        assert "made with" in tintc("run", artifact(), *given, *state).refused(2)
        assert (tmp_path / "state").read_bytes() == kept
        assert not (tmp_path / "new").exists()

    def test_a_damaged_state_is_refused(self, given: tuple[object, ...], tmp_path: Path) -> None:
        state = tmp_path / "state"
        ran(*given, "--state", state)
        whole = state.read_bytes()
        flipped = bytearray(whole)
        flipped[-1] ^= 1
        damaged = {
            whole[: len(whole) // 2]: "cannot be read as the state of a stream",
            b"": "cannot be read as the state of a stream",
            b"The river.": "cannot be read as the state of a stream",
            bytes(flipped): "is altered or damaged",
            whole.replace(b'\\"version\\":1', b'\\"version\\":7'): "malformed at version",
        }
        for content, words in damaged.items():
            assert content != whole
            state.write_bytes(content)
            message = tintc("run", artifact("exact"), *given, "--state", state).refused(1)
            assert words in message
            assert state.read_bytes() == content
        weights = artifact() / "weights.safetensors"
        message = tintc("run", artifact("exact"), *given, "--state", weights).refused(1)
        assert "holds no state of a stream" in message
        assert "no plain file" in tintc(
            "run", artifact("exact"), *given, "--state", tmp_path
        ).refused(2)

    def test_scores_that_are_not_as_they_were_left(
        self, given: tuple[object, ...], tmp_path: Path
    ) -> None:
        files = ("--scores", tmp_path / "scores", "--state", tmp_path / "state")
        ran(*given, *files)
        whole = (tmp_path / "scores").read_bytes()
        for content in (whole[:-1], b"", whole.replace(b"loss", b"lose", 1)):
            (tmp_path / "scores").write_bytes(content)
            message = tintc("run", artifact("exact"), *given, *files).refused(1)
            assert "does not hold what the state says was written" in message
            assert (tmp_path / "scores").read_bytes() == content

    def test_where_nothing_can_be_written(self, given: tuple[object, ...], tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        for option in ("--state", "--scores"):
            message = tintc(
                "run", artifact("exact"), *given, option, tmp_path / "file" / "x"
            ).refused(1)
            assert "cannot write" in message

    @pytest.mark.slow
    def test_a_killed_process_goes_on(self, given: tuple[object, ...], tmp_path: Path) -> None:
        """And what it wrote meanwhile are whole lines."""
        (tmp_path / "docs.jsonl").write_text(json.dumps({"text": f"{LONG} " * 20}) + "\n")
        files = ("--scores", tmp_path / "scores", "--state", tmp_path / "state")
        command = [sys.executable, "-m", "tintc", "run", artifact("exact"), *given, *files]
        process = subprocess.Popen(
            [str(word) for word in command], env={**os.environ, "OMP_NUM_THREADS": "1"}
        )
        scores, until = tmp_path / "scores", time.monotonic() + 120
        while not (scores.exists() and scores.stat().st_size > 20_000):
            assert time.monotonic() < until
            assert process.poll() is None
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        assert len(lines(scores)) > 100
        found = ran(*given, *files).document
        assert found == ran(*given, "--scores", tmp_path / "whole").document
        assert scores.read_bytes() == (tmp_path / "whole").read_bytes()
