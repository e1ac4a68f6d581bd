import hashlib

from qi2_jax.runtime import digests


def test_digests_of_files_are_those_of_sha256sum(tmp_path):
    first, second = tmp_path / "a", tmp_path / "b"
    first.write_bytes(b"abc")
    second.write_bytes(b"")
    known = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert digests.of_file(first).hex() == known
    assert digests.of_file(first, hashlib.md5).hex() == hashlib.md5(b"abc").hexdigest()
    both = bytes.fromhex(known) + hashlib.sha256(b"").digest()
    assert digests.of_files([first, second]) == hashlib.sha256(both).hexdigest()


def test_digests_of_weights_that_runs_have_recorded_stay_the_same(tmp_path):
    first, second = tmp_path / "a", tmp_path / "b"
    first.write_bytes(b"abc")
    second.write_bytes(b"")
    known = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert digests.of_weights([first]) == known
    assert (
        digests.of_weights([first, second])
        == hashlib.sha256((known + hashlib.sha256().hexdigest()).encode()).hexdigest()
    )
