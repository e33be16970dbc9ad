import subprocess
import sys

from tests.conftest import PROJECT_ROOT


def test_two_kills_one_inside_a_checkpoint_end_in_the_same_bits():
    """The same with 20 kills: python -m tests.slow.kill_resume"""
    result = subprocess.run([sys.executable, "-m", "tests.slow.kill_resume", "--kills", "2"], cwd=PROJECT_ROOT,
                            capture_output=True, text=True, timeout=280)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "2 kills: final LoRA equal to the bit" in result.stdout
