"""The benchmark behind ``fastjac bench``.

A case is a penalty on a network, or one phase of one activation. A contestant is a way of computing
it. No contestant is timed before its gradients agree with the float64 truth. A run goes

    case -> problem -> contestants -> gate -> rounds of samples -> records -> tables and pictures

through the modules ``cases``, ``problems``, ``contestants`` (which ``steps`` and ``phases`` set
up), ``gate``, ``measure``, ``runner`` and ``records``. ``report``, ``plots``, ``compare`` and
``page`` need only records.
"""
