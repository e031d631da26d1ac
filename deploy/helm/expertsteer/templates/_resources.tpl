{{/* Resources of the container. Takes spec. */}}
{{- define "expertsteer.resources" -}}
{{- if .spec.resources -}}
{{- toYaml .spec.resources -}}
{{- else -}}
{{- $requests := dict -}}
{{- $limits := dict -}}
{{- $spec := .spec -}}
{{- $gpu := .spec.requestGPUType | default "nvidia.com/gpu" -}}
{{- range $key, $name := dict "requestCPU" "cpu" "requestMemory" "memory" "requestGPUMem" "nvidia.com/gpumem" "requestGPUMemPercentage" "nvidia.com/gpumem-percentage" "requestGPUCores" "nvidia.com/gpucores" -}}
{{- if hasKey $spec $key -}}
{{- $_ := set $requests $name (get $spec $key | toString) -}}
{{- end -}}
{{- end -}}
{{- range $key, $name := dict "limitCPU" "cpu" "limitMemory" "memory" "limitGPUMem" "nvidia.com/gpumem" "limitGPUMemPercentage" "nvidia.com/gpumem-percentage" "limitGPUCores" "nvidia.com/gpucores" -}}
{{- if hasKey $spec $key -}}
{{- $_ := set $limits $name (get $spec $key | toString) -}}
{{- end -}}
{{- end -}}
{{- if gt (int (get $spec "requestGPU" | default 0)) 0 -}}
{{- $_ := set $requests $gpu (get $spec "requestGPU" | toString) -}}
{{- $_ := set $limits $gpu (get $spec "requestGPU" | toString) -}}
{{- end -}}
{{- $resources := dict -}}
{{- with $requests }}{{ $_ := set $resources "requests" . }}{{ end -}}
{{- with $limits }}{{ $_ := set $resources "limits" . }}{{ end -}}
{{- toYaml $resources -}}
{{- end -}}
{{- end -}}
