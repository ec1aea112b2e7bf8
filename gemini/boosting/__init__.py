"""From a module and its optimizer to chunks, hooks and a managed step."""
