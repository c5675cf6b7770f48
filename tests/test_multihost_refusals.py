"""Two processes that cannot be one run are refused at the start, in one line each."""

from tests.test_multihost import launch


def test_processes_of_unequal_shares_of_the_mesh_are_refused(cache, tmp_path):
    """Of six devices in use four are of one process: its word would be longer than the other's."""
    process = launch(tmp_path, cache, global_batch_size=12, mesh__data=6)
    output, _ = process.communicate(timeout=200)
    assert process.returncode == 2, output
    assert "mesh 6x1x1 gives the processes unequal shares of the batch" in output


def test_data_that_one_process_lacks_stops_both_in_one_line_each(cache, tmp_path):
    patch = tmp_path / "sitecustomize.py"
    patch.write_text(
        "import os\n"
        "if os.environ.get('JAX_PROCESS_ID') == '1':\n"
        "    import dinov2_jax.data.sources as sources\n"
        "    from dinov2_jax.data.records import DataError\n"
        "    def fail(path): raise DataError('not on this host')\n"
        "    sources.open_source = fail\n"
    )
    process = launch(tmp_path / "run", cache, path=tmp_path)
    output, _ = process.communicate(timeout=200)
    assert process.returncode == 2, output
    assert "process 1: data.path: not on this host" in output
    assert "process 0: process 1 could not go on" in output


def test_processes_that_differ_are_refused(cache, tmp_path):
    """Each process reads a configuration file of its own."""
    config = tmp_path / "own.py"
    config.write_text(
        "import os\nfrom configs import quickstart\ndef get_config():\n"
        "    config = quickstart.get_config()\n"
        "    config.seed = int(os.environ['JAX_PROCESS_ID'])\n"
        "    return config\n"
    )
    process = launch(tmp_path / "run", cache, f"--config={config}")
    output, _ = process.communicate(timeout=200)
    assert process.returncode == 2, output
    assert "processes [1] have another configuration than process 0" in output
