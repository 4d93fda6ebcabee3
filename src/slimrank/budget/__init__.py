"""The budget solver: candidates, their errors and costs, and the plan of least error. It knows no method."""
