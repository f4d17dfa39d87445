"""A graph that is queued again: ComfyUI has all of it in its cache, and nothing runs."""

from comfyui_server import Server
from demo_graphs import FLUX, Graph


def ran(server: Server, graph: dict) -> set[str]:
    """The nodes of a graph that ran, and were not taken from the cache."""
    events = server.events(graph)
    errors = [event["data"] for event in events if event["type"] == "execution_error"]
    assert not errors, errors[0]["exception_message"]
    kept = [event["data"]["nodes"] for event in events if event["type"] == "execution_cached"]
    return graph.keys() - set(kept[-1])


def made_and_drawn() -> Graph:
    """Quantize and draw, with the file's name and the rank through links."""
    graph = Graph()
    rank = graph.add("PrimitiveInt", value=16)
    made = graph.quantize(filename="queued-again", rank=[rank, 0]).quantizer
    model = graph.load([made, 0])
    graph.save(graph.sample(model, graph.prompt(), steps=2))
    return graph


def calibrated_and_drawn() -> Graph:
    """Calibrate and draw with the calibration, through a link; its file has no name of its own."""
    graph = Graph()
    model, positive, latent = graph.load(FLUX), graph.prompt(), graph.latent()
    sampler = graph.add("KSamplerSelect", sampler_name="euler")
    sigmas = graph.add("BasicScheduler", model=[model, 0], scheduler="simple", steps=6, denoise=1.0)
    calibration = graph.add(
        "NibbleCalibrateCache",
        model=[model, 0],
        positive=[positive, 0],
        sampler=[sampler, 0],
        sigmas=[sigmas, 0],
        latent_image=[latent, 0],
        cfg=1.0,
        seed=1,
        filename="",
        overwrite=True,
        k_max=3,
        order=2,
    )
    cached = graph.add(
        "NibbleApplySmoothCache",
        model=[model, 0],
        calibration=[calibration, 0],
        alpha=0.1,
        depth="step",
        start=0.0,
        end=1.0,
        budget=0,
        extrapolation="auto",
        first_steps=1,
        last_steps=1,
        store="gpu",
    )
    graph.save(graph.sample(cached, positive, steps=6))
    return graph


def test_a_graph_that_is_queued_again_does_not_run(server):
    before = len(server.log.read_text())  # what other graphs were told
    for graph in (made_and_drawn().nodes, calibrated_and_drawn().nodes):
        assert ran(server, graph)
        assert ran(server, graph) == set()
    assert "WARNING" not in server.log.read_text()[before:]


def test_a_graph_whose_file_is_gone_makes_it_again(server):
    graph = made_and_drawn().nodes
    ran(server, graph)
    made = server.folder("diffusion_models") / "queued-again.safetensors"
    made.unlink()
    assert {"2", "3"} <= ran(server, graph)
    assert made.exists()
    assert ran(server, graph) == set()
