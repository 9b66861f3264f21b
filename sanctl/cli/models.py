"""`sanctl models`: the networks that can be trained by name."""


def models() -> None:
    """List the networks of the registry with their parameters and smallest input."""
    import torch

    from sanctl.report.tables import print_table
    from sanctl_models import create_model, list_models, min_input_size

    rows = []
    for name in list_models():
        with torch.device("meta"):
            model = create_model(name)
        parameters = sum(parameter.numel() for parameter in model.parameters())
        rows.append((name, f"{parameters / 1e6:.1f}", min_input_size(model)))
    print_table(["network", "parameters, millions (1,000 classes)", "smallest input, px"], rows)
