"""A run whose shards are at URLs is the run on the folder they are copies of, and ends by name where one is gone."""

from tests.store_server import Fault, served
from tests.training_cases import losses, make_data, pretrain, write_recipe


def test_a_run_on_urls_has_the_losses_of_the_local_one(tmp_path):
    data = make_data(tmp_path / "data")
    pretrain(write_recipe(data, tmp_path / "local", steps=5))
    with served(data) as site:
        shards = sorted(path.name for path in (data / "train").glob("*.tar"))
        site.faults[f"train/{shards[0]}"] = [Fault(status=503), Fault(cut=3000)]
        recipe = write_recipe(data, tmp_path / "remote", steps=5)
        places = ("--data.train", f"{site.url}/train", "--data.validation", f"{site.url}/validation")
        places = (*places, "--data.cache_folder", str(tmp_path / "cache"))
        finished = pretrain(recipe, *places)
        assert losses(tmp_path / "remote") == losses(tmp_path / "local")
        assert "503 Service Unavailable" in finished.errors[0]
        checkpoints = sorted((tmp_path / "remote" / "checkpoints").iterdir())
        assert (checkpoints[-1] / "tokenizer.model").read_bytes() == (data / "train" / "tokenizer.model").read_bytes()

        (data / "train" / shards[1]).unlink()
        gone = pretrain(recipe, *places, "--folder", str(tmp_path / "again"), check=False)
        assert gone.codes == [2]
        assert f"{site.url}/train/{shards[1]}: missing: expected" in gone.errors[0]
