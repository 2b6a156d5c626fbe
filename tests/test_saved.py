import pathlib

import numpy as np
import pytest

from model.saved import SavedModel


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A model of kind `test` that doubles its input, refuses a row of 13, and calls itself out of memory above 10 rows."""
    import tensorflow as tf

    class Doubler(tf.Module):
        @tf.function(input_signature=[{"x": tf.TensorSpec([None, 2], tf.float32, name="x")}])
        def serve(self, inputs: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
            x = inputs["x"]
            with tf.control_dependencies([tf.debugging.assert_none_equal(x, 13.0)]):
                return {"y": 2 * x}

    path: pathlib.Path = tmp_path_factory.mktemp("model")
    tf.saved_model.save(Doubler(), str(path / "saved_model"))
    (path / "spec.json").write_text('{"kind": "test"}')
    return path


@pytest.mark.parametrize("bad", [[], [0], [57], [3, 4, 5], list(range(0, 60, 7)), list(range(60))])
def test_a_row_that_the_model_fails_on_costs_itself_alone(folder: pathlib.Path, bad: list[int]) -> None:
    x = np.arange(100, 220, dtype=np.float32).reshape(60, 2)
    x[bad] = 13
    got = SavedModel(folder, "test", "y", 2, 16).run({"x": x}, 60)
    expected = 2 * x
    expected[bad] = np.nan
    np.testing.assert_array_equal(got, expected)


def test_a_batch_that_does_not_fit_is_halved_and_the_size_kept(folder: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import tensorflow as tf

    model = SavedModel(folder, "test", "y", 2, 64)
    sizes: list[int] = []
    call = SavedModel._call

    def tight(self: SavedModel, part: dict[str, np.ndarray], size: int) -> np.ndarray:
        sizes.append(size)
        if size > 10:
            raise tf.errors.ResourceExhaustedError(None, None, "no memory")
        return call(self, part, size)

    monkeypatch.setattr(SavedModel, "_call", tight)
    x = np.arange(200, 400, dtype=np.float32).reshape(100, 2)
    np.testing.assert_array_equal(model.run({"x": x}, 100), 2 * x)
    assert model.batch == 8 and sizes[:4] == [64, 32, 16, 8]
    sizes.clear()
    model.run({"x": x}, 100)
    assert set(sizes) == {8}


def test_a_compiled_model_says_the_same_in_any_size_and_nothing_else(folder: pathlib.Path, caplog: pytest.LogCaptureFixture) -> None:
    x = np.arange(200, 400, dtype=np.float32).reshape(100, 2)
    for size in (1, 7, 16, 64, 128, 3):
        np.testing.assert_array_equal(SavedModel(folder, "test", "y", 2, size, compiled=True).run({"x": x}, 100), 2 * x)
    # TensorFlow warns of a function that is traced again and again.
    assert not caplog.records


def test_a_model_that_cannot_be_run_here_is_found_at_load(folder: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import tensorflow as tf

    def broken(self: SavedModel, part: dict[str, np.ndarray], size: int) -> np.ndarray:
        raise tf.errors.InternalError(None, None, "no compiler")

    monkeypatch.setattr(SavedModel, "_call", broken)
    with pytest.raises(tf.errors.InternalError, match="no compiler"):
        SavedModel(folder, "test", "y", 2, 16)


def test_no_rows(folder: pathlib.Path) -> None:
    assert SavedModel(folder, "test", "y", 2, 16).run({"x": np.empty((0, 2), np.float32)}, 0).shape == (0, 2)


@pytest.mark.parametrize(("kind", "told"), [("ranker", "kind 'test'; expected 'ranker'"), ("", "no spec.json")])
def test_what_is_no_such_model_is_refused(folder: pathlib.Path, tmp_path: pathlib.Path, kind: str, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        SavedModel(folder if kind else tmp_path, kind or "test", "y", 2, 16)
