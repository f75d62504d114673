"""The demo on the sticker model: endpoints through gradio_client."""

from __future__ import annotations

import pytest

gradio = pytest.importorskip("gradio")
SMALL = {"num_inference_steps": 3}
RUN = {"prompt": "a photo of a cat", "method": "fk", "nfe": 24, "call": SMALL}


@pytest.fixture(scope="module")
def address():
    from steering.apps.demo import launch
    from steering.apps.demo_order import Limits, Offer
    from steering.apps.demo_session import Host

    host = Host(Offer(models=("stickers",), any_model=False, limits=Limits(nfe=400)))
    page, url = launch(host, wait=False)
    yield url
    page.close()
    host.close()


@pytest.fixture(scope="module")
def client(address):
    from gradio_client import Client

    return Client(address, verbose=False)


def test_a_run_over_the_api(client):
    run = client.predict(**RUN, heldout=["detector"], api_name="/steer")
    assert run["state"] == "finished"
    again = client.predict(**RUN, heldout=["detector"], api_name="/steer")
    first, second = (r["results"][0]["rewards"] for r in (run, again))
    assert second == pytest.approx(first, abs=1e-5)
    assert run["results"][0]["pictures"][0].startswith("data:image/png;base64,")


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"prompt": " "}, "prompt"),
        ({"method": "fkk"}, "fk"),
        ({"options": {"n_particles": -3}}, "n_particles"),
        ({"nfe": 10**9}, "nfe|rows|at most"),
        ({"rewards": {"nothing": 1.0}}, "nothing"),
        ({"model": "/etc/passwd"}, "stickers"),
    ],
)
def test_bad_input_is_a_message_and_the_server_stays_up(client, change, word):
    with pytest.raises(Exception, match=f"(?i){word}"):
        client.predict(**{**RUN, **change}, api_name="/steer")
    assert {m["name"] for m in client.predict(api_name="/methods")} >= {"fk", "best_of_n"}


def test_methods_are_compared_at_one_budget(client):
    given = {k: v for k, v in RUN.items() if k != "method"}
    found = client.predict(**given, methods=["svdd"], api_name="/compare")
    assert "svdd" in found
    assert len(found) >= 2
