{{/*
Environment of the server as a list, besides the folders that the image sets: what the chart sets, servingEngineSpec.env,
the model's env; of entries with one name the last stays. Takes root, spec, steering.
*/}}
{{- define "expertsteer.environment" -}}
{{- $all := list -}}
{{- if hasKey .spec "pvcStorage" -}}
{{- $all = append $all (dict "name" "HF_HOME" "value" "/data") -}}
{{- end -}}
{{- range $name, $value := dict "VLLM_API_KEY" .root.Values.servingEngineSpec.vllmApiKey "EXPERTSTEER_ADMIN_KEY" .steering.adminKey "HF_TOKEN" .spec.hf_token -}}
{{- $key := dict "VLLM_API_KEY" "vllmApiKey" "EXPERTSTEER_ADMIN_KEY" "adminKey" "HF_TOKEN" (printf "hf_token_%s" $.spec.name) -}}
{{- with include "expertsteer.secretRef" (dict "root" $.root "value" $value "key" (get $key $name)) -}}
{{- $all = append $all (dict "name" $name "valueFrom" (dict "secretKeyRef" (fromYaml .))) -}}
{{- end -}}
{{- end -}}
{{- $all = concat $all (.root.Values.servingEngineSpec.env | default list) (.spec.env | default list) -}}
{{- $seen := dict -}}
{{- $kept := list -}}
{{- range reverse $all -}}
{{- if not (hasKey $seen .name) -}}
{{- $_ := set $seen .name true -}}
{{- $kept = prepend $kept . -}}
{{- end -}}
{{- end -}}
{{- toYaml $kept -}}
{{- end -}}
