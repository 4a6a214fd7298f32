"""Command line and environment of the server. That SGLang accepts them is checked in tests/e2e."""

from pathlib import Path

import pytest

from megatron_gkd.serving.command import ServerSettings, server_command, server_environment


@pytest.fixture
def model_folder(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text("{}")
    return tmp_path


def value_of(command: list[str], option: str) -> str:
    return command[command.index(option) + 1]


def test_only_this_machine_reaches_the_server_unless_a_key_is_given(model_folder):
    assert value_of(server_command(ServerSettings(model_folder, 64)), "--host") == "127.0.0.1"
    for host in ("0.0.0.0", "::", "10.0.0.1", "node7"):
        with pytest.raises(ValueError, match="API key"):
            ServerSettings(model_folder, 64, host=host)
        settings = ServerSettings(model_folder, 64, host=host, api_key="secret")
        command = server_command(settings, Path("/tmp/key.yaml"))
        assert value_of(command, "--config") == "/tmp/key.yaml"
        assert not [word for word in command if "secret" in word]


def test_seeds_are_honoured_by_default(model_folder):
    assert "--enable-deterministic-inference" in server_command(ServerSettings(model_folder, 64))


def test_the_context_has_room_for_the_whole_sequence(model_folder):
    command = server_command(ServerSettings(model_folder, 64, max_running_requests=3, on_cpu=True))
    assert int(value_of(command, "--context-length")) > 64
    assert int(value_of(command, "--max-total-tokens")) >= 3 * 64


def test_cpu_and_gpu_differ_in_back_ends_only(model_folder):
    cpu = server_command(ServerSettings(model_folder, 64, on_cpu=True))
    gpu = server_command(ServerSettings(model_folder, 64, mem_fraction_static=0.3))
    assert value_of(cpu, "--device") == "cpu"
    assert value_of(gpu, "--mem-fraction-static") == "0.3"
    assert "--device" not in gpu
    assert "--attention-backend" not in gpu


def test_a_server_with_random_weights_reads_none(model_folder):
    assert "--load-format" not in server_command(ServerSettings(model_folder, 64))
    command = server_command(ServerSettings(model_folder, 64, has_random_weights=True))
    assert value_of(command, "--load-format") == "dummy"


def test_extra_arguments_come_last(model_folder):
    command = server_command(ServerSettings(model_folder, 64, extra_args=("--log-level", "debug")))
    assert command[-2:] == ["--log-level", "debug"]


def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"config\.json"):
        ServerSettings(tmp_path, 64)


def test_torchruns_variables_do_not_reach_the_server(model_folder):
    inherited = {
        "PATH": "/bin",
        "RANK": "1",
        "LOCAL_RANK": "1",
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "node0",
        "MASTER_PORT": "29500",
        "TORCHELASTIC_RUN_ID": "x",
        "OMP_NUM_THREADS": "1",
        "CUDA_DEVICE_MAX_CONNECTIONS": "1",
        "SGLANG_LOG": "kept",
    }
    environment = server_environment(ServerSettings(model_folder, 64, on_cpu=True), inherited, range(4))
    left = set(environment) & (set(inherited) - {"PATH", "SGLANG_LOG", "OMP_NUM_THREADS"})
    assert left == set()
    assert environment["PATH"] == "/bin"
    assert environment["SGLANG_LOG"] == "kept"
    assert environment["OMP_NUM_THREADS"] == "4"
    assert environment["SGLANG_PLATFORM"] == "torch_cpu"
    assert inherited["RANK"] == "1"


def test_the_runs_variables_reach_the_server_but_not_the_trainers_threads(model_folder):
    of_run = {"NCCL_DEBUG": "WARN", "OMP_NUM_THREADS": "1", "CUDA_DEVICE_MAX_CONNECTIONS": "1"}
    settings = ServerSettings(model_folder, 64, environment=of_run)
    environment = server_environment(settings, {"NCCL_DEBUG": "INFO of rank 0"}, range(4))
    assert environment["NCCL_DEBUG"] == "WARN"
    assert environment["OMP_NUM_THREADS"] == "4"
    assert "CUDA_DEVICE_MAX_CONNECTIONS" not in environment


def test_the_cpu_platform_is_chosen_on_a_cpu_only(model_folder):
    environment = server_environment(ServerSettings(model_folder, 64), {}, range(4))
    assert "SGLANG_PLATFORM" not in environment


@pytest.mark.parametrize(
    ("cpus", "tp_size", "binding", "num_threads"),
    [
        (range(4), 2, "0,1|2,3", "2"),
        (range(2), 2, "0|1", "1"),
        ([5], 2, "5|5", "1"),
        (range(5), 2, "0,1|2,3", "2"),
    ],
)
def test_ranks_of_the_server_share_the_cores(model_folder, cpus, tp_size, binding, num_threads):
    settings = ServerSettings(model_folder, 64, on_cpu=True, tp_size=tp_size)
    environment = server_environment(settings, {}, list(cpus))
    assert environment["SGLANG_CPU_OMP_THREADS_BIND"] == binding
    assert environment["OMP_NUM_THREADS"] == num_threads


def test_the_number_of_threads_can_be_given(model_folder):
    settings = ServerSettings(model_folder, 64, on_cpu=True, num_threads=3)
    assert server_environment(settings, {}, range(8))["OMP_NUM_THREADS"] == "3"


@pytest.mark.parametrize(
    ("host", "url"),
    [("127.0.0.1", "http://127.0.0.1:8"), ("0.0.0.0", "http://127.0.0.1:8"), ("::1", "http://[::1]:8")],
)
def test_the_url_leads_to_the_server_from_this_machine(model_folder, host, url):
    assert ServerSettings(model_folder, 64, port=8, host=host, api_key="k").url == url
