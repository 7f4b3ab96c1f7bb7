"""The machine: devices, processes, strategies, precision, storage. Fires no hooks and knows neither Trainer nor Fabric."""
