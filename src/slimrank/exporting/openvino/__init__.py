"""OpenVINO: graphs, weights of few bits, and the runner."""
